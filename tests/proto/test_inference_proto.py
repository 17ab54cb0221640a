"""Our .proto against tritonclient's: what we serve must be what existing clients speak.

tritonclient registers its own package `inference`, so its descriptors live in a process apart.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from dualray.proto import generate

DESCRIBE = """
import importlib, json, sys
found = {}
def add(message):
    found[message.full_name] = {
        f.name: (f.number, f.type, f.is_repeated, getattr(f.containing_oneof, 'name', None))
        for f in message.fields
    }
    for nested in message.nested_types:
        add(nested)
methods = {}
for name in sys.argv[1:]:
    module = importlib.import_module(name)
    for message in module.DESCRIPTOR.message_types_by_name.values():
        add(message)
    for enum in module.DESCRIPTOR.enum_types_by_name.values():
        found[enum.full_name] = {v.name: v.number for v in enum.values}
    for service in module.DESCRIPTOR.services_by_name.values():
        for m in service.methods:
            methods[f"{service.full_name}/{m.name}"] = (
                m.input_type.full_name, m.output_type.full_name,
                m.client_streaming, m.server_streaming,
            )
print(json.dumps([found, methods]))
"""


def describe(*modules: str):
    done = subprocess.run(
        [sys.executable, "-c", DESCRIBE, *modules], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_every_message_and_method_is_the_protocols():
    ours, our_methods = describe("dualray.proto.inference_pb2")
    theirs, their_methods = describe(
        "tritonclient.grpc.service_pb2", "tritonclient.grpc.model_config_pb2"
    )
    assert len(our_methods) == 10
    for name, method in our_methods.items():
        assert method == their_methods[name], name
    for name, fields in ours.items():
        for field, description in fields.items():
            assert description == theirs[name][field], f"{name}.{field}"


def copy_of_the_protos(folder: Path) -> Path:
    target = folder / "dualray" / "proto"
    target.mkdir(parents=True)
    for path in Path(generate.__file__).parent.glob("inference*"):
        shutil.copy(path, target)
    return folder


def test_generated_code_is_up_to_date_and_a_changed_proto_is_noticed(tmp_path, monkeypatch, capsys):
    root = copy_of_the_protos(tmp_path)
    assert generate.stale_files(root) == []
    proto = root / "dualray" / "proto" / "inference.proto"
    proto.write_text(proto.read_text().replace("bool live = 1", "bool live = 9"))
    monkeypatch.setattr(generate, "__file__", str(root / "dualray" / "proto" / "generate.py"))
    assert generate.main(["--check"]) == 1
    assert capsys.readouterr().err == (
        "error: dualray/proto/inference_pb2.py differ from the .proto files; run `make proto`.\n"
    )
    assert generate.main([]) == 0
    assert generate.main(["--check"]) == 0
