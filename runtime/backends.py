"""What every backend is and can do: one row per engine library, which everything else reads.

Importing this imports no engine library; only `engine_module` does, and what asks whether a backend can run here.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

from .errors import InputError, one_line

AUTO = "auto"  # stands for the fastest backend that runs here
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8", "int8-weights", "int4-weights")  # each run by some backend


@dataclass(frozen=True)
class QdqForm:
    """How a library takes quantized graphs.

    Attributes:
        rest: Number format of everything else that stands in the graph.
        unsigned: Whether inputs are uint8 with 128 for zero, which stands for the same numbers as int8: ONNX Runtime's
            kernels are fast for that.
    """

    rest: str = "fp32"
    unsigned: bool = False


@dataclass(frozen=True)
class TritonModel:
    """What Triton is told of a backend's engines.

    Attributes:
        backend: Triton's name of the backend.
        file: Name of the file that it opens.
        batches: Whether Triton may batch requests for it. Its OpenVINO backend pads every call to the largest batch.
    """

    backend: str
    file: str
    batches: bool = True


@dataclass(frozen=True)
class Backend:
    """An engine library.

    Attributes:
        name: As users write it, and the manifest has it.
        title: For people.
        module: The module in this package that alone imports the library. It has `describe() -> str` (one line: version
            and devices) and `open_engine(path, settings) -> EngineRunner`. One whose library may be there without
            anything to run on also has `unusable() -> str | None`: why no engine can run here, which `describe` then
            tells too.
        library: What is imported.
        distributions: Packages that the library comes in; the first is what to install.
        extra: Of the package tocom, which brings the library; None where none does.
        precisions: Number formats that it computes in.
        expands_functions: Whether it runs graphs with model-local functions.
        typed: Whether it computes in the formats that stand in the graph; if not, it chooses by a hint.
        builds_plans: Whether its engines are plans, built from the graph.
        builds_without_device: Whether its engines can be built where they cannot be run.
        has_native_operators: Whether operators of this project's own may run in it. Then `module` also has
            `native_operators() -> frozenset[str]`: those that run here without their function bodies.
        fuses_by_outputs: Whether it fuses less when a graph puts out more, so that half precision rounds elsewhere.
        qdq: How it takes quantized graphs.
        gates: Precision -> the number format whose gates an engine is held to, where that is another one.
        float_rival: Precision that a quantized engine competes with: the fastest that is not quantized. None where that
            is not measured.
        triton: None where Triton has no backend for it.
    """

    name: str
    title: str
    module: str
    library: str
    distributions: tuple[str, ...]
    extra: str | None
    precisions: tuple[str, ...]
    expands_functions: bool = True
    typed: bool = True
    builds_plans: bool = False
    builds_without_device: bool = False
    has_native_operators: bool = False
    fuses_by_outputs: bool = False
    qdq: QdqForm = QdqForm()
    gates: Mapping[str, str] = field(default_factory=dict)
    float_rival: str | None = None
    triton: TritonModel | None = None

    def checked_as(self, precision: str) -> str:
        """The number format whose gates an engine in a precision is held to."""
        return self.gates.get(precision, precision)

    def version(self) -> str:
        """The version of the library that is installed, without importing it.

        Raises:
            InputError: It is not installed.
        """
        for name in self.distributions:
            try:
                return version(name)
            except PackageNotFoundError:
                continue
        raise InputError(f"backend {self.name} cannot run here, {self._to_install}")

    @property
    def _to_install(self) -> str:
        within = "" if self.extra is None else f" (or 'tocom[{self.extra}]')"
        return f"not installed: pip install {self.distributions[0]}{within}"

    def why_not(self, error: ImportError) -> str:
        """What an import of the library that failed means, in one line."""
        if isinstance(error, ModuleNotFoundError) and error.name == self.library:
            return self._to_install
        return f"its library does not load: {one_line(error)}"


_INT8_AND_HALF = {"int8": "int8+half"}  # int8 rounds otherwise where the rest of the network is in half precision

BACKENDS: Mapping[str, Backend] = {
    row.name: row
    for row in (
        Backend(
            name="onnxruntime",
            title="ONNX Runtime",
            module=f"{__package__}.engines.onnxruntime_engine",
            library="onnxruntime",
            distributions=("onnxruntime", "onnxruntime-gpu"),
            extra="cpu",
            precisions=("fp32", "fp16", "int8"),
            qdq=QdqForm(unsigned=True),
            float_rival="fp32",
            triton=TritonModel("onnxruntime", "model.onnx"),
        ),
        Backend(
            name="openvino",
            title="OpenVINO",
            module=f"{__package__}.engines.openvino_engine",
            library="openvino",
            distributions=("openvino",),
            extra="openvino",
            precisions=("fp32", "bf16", "int8"),  # of int8 the rest is in bf16, where the processor has that
            expands_functions=False,
            typed=False,
            has_native_operators=True,
            fuses_by_outputs=True,
            gates=_INT8_AND_HALF,
            float_rival="bf16",
            triton=TritonModel("openvino", "model.onnx", batches=False),
        ),
        Backend(
            name="tensorrt",
            title="TensorRT",
            module=f"{__package__}.engines.tensorrt.nvidia",
            library="tensorrt",
            distributions=("tensorrt-cu13", "tensorrt"),
            extra=None,
            precisions=PRECISIONS,
            builds_plans=True,
            qdq=QdqForm(rest="fp16"),
            gates=_INT8_AND_HALF,
            triton=TritonModel("tensorrt", "model.plan"),
        ),
        Backend(
            name="tensorrt-rtx",
            title="TensorRT for RTX",
            module=f"{__package__}.engines.tensorrt.rtx",
            library="tensorrt_rtx",
            distributions=("tensorrt-rtx-cu13", "tensorrt-rtx"),
            extra="tensorrt-rtx",
            precisions=PRECISIONS,
            builds_plans=True,
            builds_without_device=True,
            qdq=QdqForm(rest="fp16"),
            gates=_INT8_AND_HALF,
        ),
    )
}


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can run on this machine.

    Attributes:
        name: One of `BACKENDS`.
        usable: Whether `open_engine` can work with it.
        detail: One line: version and devices, or why it cannot run and what to do.
    """

    name: str
    usable: bool
    detail: str


def named(backend: str) -> Backend:
    """The row of a backend.

    Raises:
        InputError: There is none of that name.
    """
    if backend not in BACKENDS:
        raise InputError(f"backend must be one of {', '.join(BACKENDS)}, got {one_line(backend)}")
    return BACKENDS[backend]


def running(precision: str) -> tuple[str, ...]:
    """Backends that compute in a precision."""
    return tuple(row.name for row in BACKENDS.values() if precision in row.precisions)


def require(backend: str, precision: str) -> None:
    """Refuses a backend that does not exist and a precision that it does not compute in, without importing a library.

    Args:
        backend: One of `BACKENDS`, or `AUTO`.
        precision: A number format.

    Raises:
        InputError: The backend or the precision does not exist, or they do not go together.
    """
    if backend != AUTO and backend not in BACKENDS:
        raise InputError(f"backend must be {AUTO} or one of {', '.join(BACKENDS)}, got {one_line(repr(backend))}")
    known = PRECISIONS if backend == AUTO else BACKENDS[backend].precisions
    if precision in known:
        return
    whose = "" if backend == AUTO else f" for {backend}"
    others = running(precision)
    hint = f": {', '.join(others)} {'runs' if len(others) == 1 else 'run'} that" if others else ""
    raise InputError(f"precision must be one of {', '.join(known)}{whose}, got {one_line(repr(precision))}{hint}")


def precisions_in_words() -> str:
    """All precisions with the backends that run them, for help texts; a backend that has all is not repeated."""
    words = []
    for precision in PRECISIONS:
        backends = running(precision)
        words.append(precision if len(backends) == len(BACKENDS) else f"{precision} ({', '.join(backends)})")
    return ", ".join(words)


def engine_module(backend: str) -> ModuleType:
    """Imports the engine module of a backend, and with it the library.

    Raises:
        InputError: There is no such backend, or its library is not installed or does not load.
    """
    row = named(backend)
    try:
        return importlib.import_module(row.module)
    except ImportError as error:
        raise InputError(f"backend {backend} cannot run here, {row.why_not(error)}") from error


def describe(backend: str) -> str:
    """Version and devices of a backend, in one line.

    Raises:
        InputError: The backend is unknown or not installed.
    """
    return engine_module(backend).describe()


def native_operators(backend: str) -> frozenset[str]:
    """Operators of this project that a backend runs here without their function bodies.

    Raises:
        InputError: The backend is unknown, or has such operators and is not installed.
    """
    return engine_module(backend).native_operators() if named(backend).has_native_operators else frozenset()


def why_unusable(backend: str) -> str | None:
    """Why no engine of a backend that is installed can run here; None where one can.

    Raises:
        InputError: The backend is unknown or not installed.
    """
    return _why_unusable(engine_module(backend))


def available() -> list[BackendStatus]:
    """Says of every backend whether it can run here, without loading an engine."""
    return [_status(row) for row in BACKENDS.values()]


def _status(row: Backend) -> BackendStatus:
    try:
        module = importlib.import_module(row.module)
    except ImportError as error:
        return BackendStatus(row.name, False, row.why_not(error))
    return BackendStatus(row.name, _why_unusable(module) is None, module.describe())


def _why_unusable(module: ModuleType) -> str | None:
    return module.unusable() if hasattr(module, "unusable") else None
