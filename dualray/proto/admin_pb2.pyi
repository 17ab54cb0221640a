from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PauseMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PAUSE_MODE_UNSPECIFIED: _ClassVar[PauseMode]
    PAUSE_MODE_ABORT: _ClassVar[PauseMode]
    PAUSE_MODE_WAIT: _ClassVar[PauseMode]
    PAUSE_MODE_KEEP: _ClassVar[PauseMode]

class Mode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MODE_UNSPECIFIED: _ClassVar[Mode]
    MODE_TRAIN: _ClassVar[Mode]
    MODE_SERVE: _ClassVar[Mode]
    MODE_PAUSE: _ClassVar[Mode]
PAUSE_MODE_UNSPECIFIED: PauseMode
PAUSE_MODE_ABORT: PauseMode
PAUSE_MODE_WAIT: PauseMode
PAUSE_MODE_KEEP: PauseMode
MODE_UNSPECIFIED: Mode
MODE_TRAIN: Mode
MODE_SERVE: Mode
MODE_PAUSE: Mode

class PauseGenerationRequest(_message.Message):
    __slots__ = ("mode",)
    MODE_FIELD_NUMBER: _ClassVar[int]
    mode: PauseMode
    def __init__(self, mode: _Optional[_Union[PauseMode, str]] = ...) -> None: ...

class PauseGenerationResponse(_message.Message):
    __slots__ = ("num_requests",)
    NUM_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    num_requests: int
    def __init__(self, num_requests: _Optional[int] = ...) -> None: ...

class ResumeGenerationRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ResumeGenerationResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SetModeRequest(_message.Message):
    __slots__ = ("mode",)
    MODE_FIELD_NUMBER: _ClassVar[int]
    mode: Mode
    def __init__(self, mode: _Optional[_Union[Mode, str]] = ...) -> None: ...

class SetModeResponse(_message.Message):
    __slots__ = ("mode", "switched", "step", "sentences", "first_token_s", "first_step_s", "drain_s", "num_cut")
    MODE_FIELD_NUMBER: _ClassVar[int]
    SWITCHED_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    SENTENCES_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_S_FIELD_NUMBER: _ClassVar[int]
    FIRST_STEP_S_FIELD_NUMBER: _ClassVar[int]
    DRAIN_S_FIELD_NUMBER: _ClassVar[int]
    NUM_CUT_FIELD_NUMBER: _ClassVar[int]
    mode: Mode
    switched: bool
    step: int
    sentences: _containers.RepeatedScalarFieldContainer[str]
    first_token_s: float
    first_step_s: float
    drain_s: float
    num_cut: int
    def __init__(self, mode: _Optional[_Union[Mode, str]] = ..., switched: _Optional[bool] = ..., step: _Optional[int] = ..., sentences: _Optional[_Iterable[str]] = ..., first_token_s: _Optional[float] = ..., first_step_s: _Optional[float] = ..., drain_s: _Optional[float] = ..., num_cut: _Optional[int] = ...) -> None: ...

class GetModeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetModeResponse(_message.Message):
    __slots__ = ("mode", "run_state", "engine_state", "step")
    MODE_FIELD_NUMBER: _ClassVar[int]
    RUN_STATE_FIELD_NUMBER: _ClassVar[int]
    ENGINE_STATE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    mode: Mode
    run_state: str
    engine_state: str
    step: int
    def __init__(self, mode: _Optional[_Union[Mode, str]] = ..., run_state: _Optional[str] = ..., engine_state: _Optional[str] = ..., step: _Optional[int] = ...) -> None: ...

class GetWeightVersionRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetWeightVersionResponse(_message.Message):
    __slots__ = ("model", "training_step", "digest", "serving")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TRAINING_STEP_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SERVING_FIELD_NUMBER: _ClassVar[int]
    model: str
    training_step: int
    digest: str
    serving: bool
    def __init__(self, model: _Optional[str] = ..., training_step: _Optional[int] = ..., digest: _Optional[str] = ..., serving: _Optional[bool] = ...) -> None: ...

class GetExpertPlacementRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetExpertPlacementResponse(_message.Message):
    __slots__ = ("layers",)
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    layers: _containers.RepeatedCompositeFieldContainer[LayerPlacement]
    def __init__(self, layers: _Optional[_Iterable[_Union[LayerPlacement, _Mapping]]] = ...) -> None: ...

class LayerPlacement(_message.Message):
    __slots__ = ("layer", "ranks")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    layer: int
    ranks: _containers.RepeatedCompositeFieldContainer[RankPlacement]
    def __init__(self, layer: _Optional[int] = ..., ranks: _Optional[_Iterable[_Union[RankPlacement, _Mapping]]] = ...) -> None: ...

class RankPlacement(_message.Message):
    __slots__ = ("experts", "num_homes")
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    NUM_HOMES_FIELD_NUMBER: _ClassVar[int]
    experts: _containers.RepeatedScalarFieldContainer[int]
    num_homes: int
    def __init__(self, experts: _Optional[_Iterable[int]] = ..., num_homes: _Optional[int] = ...) -> None: ...
