"""Kubernetes objects: KubeRay accepts them, and they say what the run file says."""

import dataclasses
import json
import math
from pathlib import Path

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from dualray.errors import ConfigError
from dualray.k8s.config import KubernetesConfig
from dualray.k8s.deployment import Deployment, object_name
from dualray.k8s.render import render, to_yaml
from dualray.platform.commands.k8s import app, deployment_of
from dualray.platform.run_file import load_run_file, parse_run_file

# Where it comes from stands in its $comment. A new field fails here until it is added there from
# KubeRay's definitions.
SCHEMAS = json.loads((Path(__file__).parent / "kuberay_1_7_subset.json").read_text())

PLAIN = Deployment(
    name="Demo_run.1",
    run_yaml="name: Demo_run.1\nseed: 0\n",
    num_workers=4,
    cpus_per_worker=1.5,
    gpus_per_worker=0,
    grpc_port=50051,
    kubernetes=KubernetesConfig(),
    ray_version="2.60.0",
)
SCALING = dataclasses.replace(
    PLAIN,
    gpus_per_worker=2.0,
    engine_metrics_port=9400,
    kubernetes=KubernetesConfig(
        autoscale=True, min_workers=1, max_workers=6, token_secret="ray-token", claim="lake"
    ),
)


def check(ray_object):
    schema = SCHEMAS[ray_object["kind"]]
    errors = jsonschema.Draft202012Validator(schema).iter_errors(ray_object)
    assert [f"{list(e.absolute_path)}: {e.message}" for e in errors] == []


def by_kind(objects):
    assert len({o["kind"] for o in objects}) == len(objects)
    return {o["kind"]: o for o in objects}


def cluster_of(deployment, kind="rayjob"):
    objects = by_kind(render(deployment, kind))
    spec = objects["RayJob" if kind == "rayjob" else "RayCluster"]["spec"]
    return spec["rayClusterSpec"] if kind == "rayjob" else spec


@pytest.mark.parametrize("deployment", [PLAIN, SCALING], ids=["plain", "scaling"])
@pytest.mark.parametrize("kind", ["rayjob", "raycluster"])
def test_kuberay_accepts_it(deployment, kind):
    read_back = list(yaml.safe_load_all(to_yaml(render(deployment, kind))))
    assert read_back == render(deployment, kind)
    rays = [o for o in read_back if o["apiVersion"] == "ray.io/v1"]
    assert [o["kind"].lower() for o in rays] == [kind]
    check(rays[0])


def test_the_schemas_refuse_what_kuberay_refuses():
    # Proof that `check` can fail: a number for a string, an unknown field, a bad enumeration.
    for spoil in (
        lambda s: s["workerGroupSpecs"][0]["template"]["spec"]["containers"][0].update(
            terminationGracePeriod=3
        ),
        lambda s: s["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
        lambda s: s["autoscalerOptions"].update(version="v3"),
        lambda s: s["workerGroupSpecs"][0].pop("template"),
    ):
        cluster = by_kind(render(SCALING, "raycluster"))["RayCluster"]
        spoil(cluster["spec"])
        with pytest.raises(AssertionError):
            check(cluster)


def test_one_pod_for_each_worker():
    (group,) = cluster_of(PLAIN)["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (4, 4, 4)
    (container,) = group["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"cpu": "2", "memory": "4Gi"}
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert cluster_of(PLAIN)["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert "enableInTreeAutoscaling" not in cluster_of(PLAIN)


def test_gpus_and_scaling():
    cluster = cluster_of(SCALING)
    (group,) = cluster["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    # A string: the API's typed clients refuse a number.
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "2"
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (1, 1, 6)
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["autoscalerOptions"]["version"] == "v2"
    assert cluster["authOptions"] == {"mode": "token", "secretName": "ray-token"}
    # The second autoscaler asks for it.
    assert group["template"]["spec"]["restartPolicy"] == "Never"
    head = cluster["headGroupSpec"]["template"]["spec"]
    assert head["automountServiceAccountToken"] is True
    assert group["template"]["spec"]["automountServiceAccountToken"] is False


def pods(deployment, kind):
    cluster = cluster_of(deployment, kind)
    found = [cluster["headGroupSpec"]["template"], cluster["workerGroupSpecs"][0]["template"]]
    if kind == "rayjob":
        job = by_kind(render(deployment, kind))["RayJob"]
        found.append(job["spec"]["submitterPodTemplate"])
    return found


@pytest.mark.parametrize("kind", ["rayjob", "raycluster"])
def test_every_pod_keeps_to_the_restricted_profile(kind):
    for pod in pods(SCALING, kind):
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in spec["containers"]:
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False
            assert security["readOnlyRootFilesystem"] is True
            assert security["capabilities"] == {"drop": ["ALL"]}
            # What is mounted exists, and Ray has somewhere to write.
            mounts = {m["mountPath"]: m["name"] for m in container["volumeMounts"]}
            assert set(mounts.values()) <= {v["name"] for v in spec["volumes"]}
            assert "/tmp" in mounts
            assert {"name": "HOME", "value": "/tmp"} in container["env"]
    assert cluster_of(SCALING)["autoscalerOptions"]["securityContext"] == security


@pytest.mark.parametrize("drain_s", [0.0, 30.0, 299.5])
def test_pods_have_time_for_requests_and_a_checkpoint(drain_s):
    head, worker = pods(dataclasses.replace(PLAIN, drain_s=drain_s), "raycluster")
    ending_s = math.ceil(drain_s) + 60
    for pod in (head, worker):
        assert pod["spec"]["terminationGracePeriodSeconds"] == ending_s + 30
        environment = {e["name"]: e["value"] for e in pod["spec"]["containers"][0]["env"]}
        assert environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] == str(ending_s)
        assert ("RAY_JOB_STOP_WAIT_TIME_S" in environment) is (pod is head)


@pytest.mark.parametrize("kind", ["rayjob", "raycluster"])
def test_the_service_finds_the_head_pod_and_no_other(kind):
    selector = by_kind(render(PLAIN, kind))["Service"]["spec"]["selector"]
    # What KubeRay itself puts on the head pod of a cluster.
    operators = {"ray.io/cluster": "demo-run-1", "ray.io/node-type": "head"}
    head, worker, *submitter = pods(PLAIN, kind)
    assert selector.items() <= (head["metadata"]["labels"] | operators).items()
    workers = operators | {"ray.io/node-type": "worker"}
    assert not selector.items() <= (worker["metadata"]["labels"] | workers).items()
    for pod in submitter:
        assert not selector.items() <= pod["metadata"]["labels"].items()
    (port,) = by_kind(render(PLAIN, kind))["Service"]["spec"]["ports"]
    assert (port["port"], port["appProtocol"]) == (50051, "kubernetes.io/h2c")


def test_the_policy_lets_in_what_must_come_in():
    policy = by_kind(render(PLAIN))["NetworkPolicy"]["spec"]
    run = {"matchLabels": {"dualray/run": "demo-run-1"}}
    assert policy["podSelector"] == run
    assert policy["ingress"][0] == {"from": [{"podSelector": run}]}
    assert {"ports": [{"protocol": "TCP", "port": 50051}]} in policy["ingress"]
    silent = by_kind(render(dataclasses.replace(PLAIN, grpc_port=None)))
    assert "Service" not in silent
    assert "50051" not in json.dumps(silent)


def test_prometheus_finds_the_engine_in_the_head_pod_and_may_come_in():
    spec = cluster_of(SCALING)
    head = spec["headGroupSpec"]["template"]
    annotations = head["metadata"]["annotations"]
    assert (annotations["prometheus.io/port"], annotations["prometheus.io/scheme"]) == (
        "9400",
        "http",
    )
    secured = cluster_of(dataclasses.replace(SCALING, engine_metrics_tls=True))
    annotations = secured["headGroupSpec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/scheme"] == "https"
    ports = {p["name"]: p["containerPort"] for p in head["spec"]["containers"][0]["ports"]}
    assert ports["engine-metrics"] == 9400
    assert len(set(ports.values())) == len(ports)
    (worker,) = spec["workerGroupSpecs"]
    assert "annotations" not in worker["template"]["metadata"]
    ingress = by_kind(render(SCALING))["NetworkPolicy"]["spec"]["ingress"]
    anyone = [rule for rule in ingress if rule.get("from") == [{"namespaceSelector": {}}]]
    assert [p["port"] for rule in anyone for p in rule["ports"]] == [8080, 9400]
    assert "prometheus.io" not in json.dumps(render(PLAIN))


def test_the_claim():
    assert "PersistentVolumeClaim" not in by_kind(render(SCALING))
    mine = by_kind(render(PLAIN))["PersistentVolumeClaim"]
    assert mine["spec"]["accessModes"] == ["ReadWriteMany"]
    for deployment, name in ((PLAIN, mine["metadata"]["name"]), (SCALING, "lake")):
        volumes = cluster_of(deployment)["workerGroupSpecs"][0]["template"]["spec"]["volumes"]
        assert {"name": "workspace", "persistentVolumeClaim": {"claimName": name}} in volumes


@pytest.mark.parametrize(
    ("run_name", "name"),
    [("demo", "demo"), ("Demo_Run.1", "demo-run-1"), ("7b", "run-7b"), ("a..b-", "a-b")],
)
def test_names(run_name, name):
    assert object_name(run_name) == name


def test_a_name_too_long():
    with pytest.raises(ConfigError) as caught:
        object_name("x" * 41)
    assert str(caught.value) == (
        f"name is {'x' * 41!r}, {'x' * 41!r} as a Kubernetes name, and must have 1 to 40 "
        "characters; give the run a shorter name of letters, digits and '-'."
    )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"gpus_per_worker": 0.5},
            "cluster.gpus_per_worker is 0.5 and Kubernetes gives whole GPUs only; set "
            "cluster.gpus_per_worker to a whole number.",
        ),
        (
            {"grpc_port": 0},
            "serve.port is 0 and a Service needs a port known beforehand; set serve.port, say to "
            "50051.",
        ),
        (
            {"engine_metrics_port": 8080},
            "serve.metrics_port is 8080 and must be known beforehand and none of Ray's own 8265 "
            "and 8080 in the head pod; set serve.metrics_port, say to 9400.",
        ),
        (
            {"kubernetes": KubernetesConfig(autoscale=True, max_workers=3)},
            "kubernetes.max_workers is 3 and the layout has 4 workers, which must not exceed it; "
            "set kubernetes.max_workers to 4 or more.",
        ),
    ],
)
def test_deployments_that_cannot_be(changes, sentence):
    with pytest.raises(ConfigError) as caught:
        dataclasses.replace(PLAIN, **changes)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"namespace": "My_space"}, "kubernetes.namespace is 'My_space' and must be a DNS label"),
        ({"claim": "a/b"}, "kubernetes.claim is 'a/b' and must be a DNS label"),
        ({"head_memory": "8 GB"}, "kubernetes.head_memory is '8 GB' and must be a quantity"),
        ({"image": ""}, "kubernetes.image is '' and must name an image"),
        ({"head_cpus": 0}, "kubernetes.head_cpus is 0 and must be above 0"),
        ({"keep_s": -1}, "kubernetes.keep_s is -1 and must be 0 or more"),
        ({"min_workers": 3, "max_workers": 2}, "kubernetes.max_workers is 2 and kubernetes.min_"),
    ],
)
def test_bad_fields(fields, sentence):
    with pytest.raises(ConfigError) as caught:
        KubernetesConfig(**fields)
    assert str(caught.value).startswith(sentence)


RUN = """
name: demo
model: tiny
data: {path: data/shakespeare}
layout: {pipeline: 2, experts: 2}
train: {steps: 5, seq_len: 16, micro_batch_size: 1, micro_batches: 4}
cluster: {address: "10.0.0.1:6379"}
"""


def test_the_command(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    result = CliRunner().invoke(app, ["render", str(path), "--set", "serve.port=50077"])
    assert result.exit_code == 0, result.output
    assert "# The shards belong into the claim, under data/shakespeare.\n" in result.output
    objects = by_kind(list(yaml.safe_load_all(result.output)))
    check(objects["RayJob"])
    assert objects["RayJob"]["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"] == 4
    # The pods read the same run, at their own cluster's address and on every interface.
    inside = parse_run_file(yaml.safe_load(objects["ConfigMap"]["data"]["run.yaml"]))
    outside = load_run_file(path, ["serve.port=50077"])
    assert (inside.serve.host, inside.serve.port) == ("0.0.0.0", 50077)
    assert inside.cluster.address is None
    assert (inside.model, inside.train, inside.layout) == (
        outside.model,
        outside.train,
        outside.layout,
    )


def test_a_run_that_does_not_serve_has_no_port(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    run = load_run_file(path, ["serve.after_training=false", "serve.port=0"])
    assert deployment_of(run).grpc_port is None


def test_pods_wait_as_long_as_the_run_drains(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    assert deployment_of(load_run_file(path, ["serve.drain_s=77"])).drain_s == 77.0
