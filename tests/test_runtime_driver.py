"""The launch path against a stand-in for libcuda: what bytes arrive, in which context, and every refusal in words."""

from __future__ import annotations

import ctypes
import gc
import struct
import threading
from dataclasses import dataclass, field

import pytest

from marlin.errors import LaunchError, UnsupportedError
from marlin.runtime import compiler, driver, loaded

I, P = ctypes.c_int, ctypes.c_void_p  # noqa: E741
OURS, OTHER = 0x1000, 0x2000  # contexts
ATTRIBUTES = {13: 1980000, 16: 132, 36: 2619000, 37: 5120, 38: 52428800, 75: 9, 76: 0, 97: 232448}
# (name, what it means) of the codes that the tests return.
CODES = {
    1: ("CUDA_ERROR_INVALID_VALUE", "invalid argument"),
    2: ("CUDA_ERROR_OUT_OF_MEMORY", "out of memory"),
    100: ("CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"),
    200: ("CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"),
    500: ("CUDA_ERROR_NOT_FOUND", "named symbol not found"),
    700: ("CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"),
}


def at(address: int, kind: type) -> ctypes._SimpleCData:
    """The C variable at an address."""
    return kind.from_address(address)


@dataclass
class Launch:
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    smem: int
    stream: int
    attributes: list[tuple[int, ...]]
    function: int
    context: int | None
    values: list[object]


@dataclass
class FakeCuda:
    """The entry points in use, as C functions; `fails` maps a name to the code that it returns."""

    context: int | None = OURS
    version: int = 13000
    count: int = 2
    capture: tuple[int, int] = (0, 99)
    attributes: dict[int, int] = field(default_factory=lambda: dict(ATTRIBUTES))
    fails: dict[str, int] = field(default_factory=dict)
    types: tuple[type, ...] = ()
    launches: list[Launch] = field(default_factory=list)
    calls: list[tuple[object, ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._words: list[object] = []
        shapes = {
            "cuInit": (I,),
            "cuDriverGetVersion": (P,),
            "cuDeviceGetCount": (P,),
            "cuDeviceGet": (P, I),
            "cuDeviceGetName": (P, I, I),
            "cuDeviceGetAttribute": (P, I, I),
            "cuDevicePrimaryCtxRetain": (P, I),
            "cuCtxGetCurrent": (P,),
            "cuCtxSetCurrent": (P,),
            "cuCtxSynchronize": (),
            "cuThreadExchangeStreamCaptureMode": (P,),
            "cuModuleLoadData": (P, ctypes.c_char_p),
            "cuModuleGetFunction": (P, P, ctypes.c_char_p),
            "cuFuncSetAttribute": (P, I, I),
            "cuGetErrorName": (I, P),
            "cuGetErrorString": (I, P),
            "cuLaunchKernelEx": (P, P, P, P),
            "cuStreamGetCaptureInfo_v2": (P, P, P, P, P, P),
        }
        for name, shape in shapes.items():
            setattr(self, name, ctypes.CFUNCTYPE(I, *shape)(self._guarded(name)))

    def _guarded(self, name):
        act = getattr(self, f"_{name}")

        def call(*arguments):
            if name in self.fails:
                return self.fails[name]
            return act(*arguments) or 0

        return call

    def _cuInit(self, flags): ...

    def _cuDriverGetVersion(self, out):
        at(out, I).value = self.version

    def _cuDeviceGetCount(self, out):
        at(out, I).value = self.count

    def _cuDeviceGet(self, out, index):
        at(out, I).value = 10 + index

    def _cuDeviceGetName(self, out, size, device):
        ctypes.memmove(out, b"NVIDIA H100 80GB HBM3\0", 22)

    def _cuDeviceGetAttribute(self, out, code, device):
        at(out, I).value = self.attributes[code]

    def _cuDevicePrimaryCtxRetain(self, out, device):
        at(out, P).value = OURS + device - 10

    def _cuCtxGetCurrent(self, out):
        at(out, P).value = self.context

    def _cuCtxSetCurrent(self, context):
        self.calls.append(("set", context))
        self.context = context

    def _cuCtxSynchronize(self):
        self.calls.append(("synchronize", self.context))

    def _cuThreadExchangeStreamCaptureMode(self, mode):
        self.calls.append(("mode", at(mode, I).value))
        at(mode, I).value = 0

    def _cuModuleLoadData(self, out, image):
        self.calls.append(("load", image, self.context))
        at(out, P).value = 0x77

    def _cuModuleGetFunction(self, out, module, entry):
        self.calls.append(("function", module, entry))
        at(out, P).value = 0x88

    def _cuFuncSetAttribute(self, function, attribute, value):
        self.calls.append(("attribute", function, attribute, value))

    def _word(self, code, out, which):
        if code not in CODES:
            return 1
        self._words.append(text := ctypes.create_string_buffer(CODES[code][which].encode()))
        at(out, P).value = ctypes.addressof(text)

    def _cuGetErrorName(self, code, out):
        return self._word(code, out, 0)

    def _cuGetErrorString(self, code, out):
        return self._word(code, out, 1)

    def _cuLaunchKernelEx(self, config, function, params, extra):
        *extents, smem, stream, attribute, count = struct.unpack("@7IPPI", ctypes.string_at(config, 52))
        found = [struct.unpack("@I4x3I52x", ctypes.string_at(attribute + 72 * i, 72)) for i in range(count)]
        pointers = [at(params + 8 * i, P).value for i in range(len(self.types))]
        values = [at(pointer, kind).value for pointer, kind in zip(pointers, self.types, strict=True)]
        grid, block = tuple(extents[:3]), tuple(extents[3:])
        self.launches.append(Launch(grid, block, smem, stream, found, function, self.context, values))

    def _cuStreamGetCaptureInfo_v2(self, stream, status, number, graph, dependencies, count):
        assert (graph, dependencies, count) == (None, None, None)
        self.calls.append(("capture", stream))
        at(status, I).value, at(number, ctypes.c_uint64).value = self.capture


def forget() -> None:
    for function in (driver._open, driver.libcuda, driver.device_info, driver.primary_context):
        function.cache_clear()
    driver._thread = threading.local()


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: fake)
    forget()
    yield fake
    forget()


@pytest.fixture
def no_driver(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    forget()
    yield
    forget()


def load(signature: str = "", smem_bytes: int = 0, device_index: int = 0, cubin: bytes = b"image") -> loaded.Kernel:
    return loaded.load_kernel(cubin, "entry", device_index=device_index, smem_bytes=smem_bytes, signature=signature)


# Devices


def test_device_info_reads_every_attribute(cuda):
    assert driver.device_info(1) == driver.DeviceInfo(
        index=1,
        name="NVIDIA H100 80GB HBM3",
        arch=(9, 0),
        num_sms=132,
        smem_optin_bytes=232448,
        l2_bytes=52428800,
        sm_clock_khz=1980000,
        memory_bytes_per_s=2 * 2619e6 * 640,
    )
    assert driver.device_info(1) is driver.device_info(1)


@pytest.mark.parametrize("index", [-1, 2])
def test_device_info_refuses_an_index_beyond_the_gpus(cuda, index):
    with pytest.raises(ValueError) as caught:
        driver.device_info(index)
    assert str(caught.value) == f"device_info: index must be below the number of GPUs, 2; got index={index}."


@pytest.mark.parametrize(
    ("name", "arch", "expected"),
    [
        ("NVIDIA H100 PCIe", (9, 0), 3.35e12),
        ("NVIDIA H200", (9, 0), 4.8e12),
        ("NVIDIA A100-SXM4-40GB", (8, 0), 1.55e12),
        ("NVIDIA A10G", (8, 6), 6.0e11),
        ("NVIDIA L40S", (8, 9), 8.6e11),
        ("NVIDIA L4", (8, 9), 3.0e11),
        ("Something of Blackwell", (10, 0), 6.0e12),
        ("Something else", (13, 0), 3.0e11),
    ],
)
def test_bandwidth_comes_from_tables_when_the_driver_reports_no_clock(name, arch, expected):
    assert driver._bandwidth(name, arch, 0, 5120) == expected == driver._bandwidth(name, arch, 1000, 0)


def test_driver_version_and_count(cuda):
    cuda.version = 12080
    assert (driver.driver_version(), driver.device_count()) == ((12, 8), 2)


@pytest.mark.usefixtures("no_driver")
def test_without_a_driver_questions_are_answered_and_work_is_refused():
    assert (driver.driver_version(), driver.device_count()) == (None, 0)
    for work in (lambda: driver.device_info(0), load, lambda: driver.current_capture_id(0)):
        with pytest.raises(UnsupportedError) as caught:
            work()
        assert str(caught.value) == (
            "driver: an NVIDIA driver must be installed; got no libcuda.so.1 (libcuda.so.1: cannot open shared object "
            "file). Install or repair the NVIDIA driver (nvidia-smi must work); without a GPU the CPU implementation "
            "runs."
        )


def test_a_driver_without_gpus_says_what_to_check(cuda):
    cuda.fails["cuInit"] = 100
    assert driver.device_count() == 0
    with pytest.raises(UnsupportedError) as caught:
        driver.device_info(0)
    assert str(caught.value) == (
        "driver: the NVIDIA driver must find a GPU; got CUDA_ERROR_NO_DEVICE (no CUDA-capable device is detected). "
        "Check CUDA_VISIBLE_DEVICES and, in a container, that the GPU is passed in."
    )


def test_a_forked_process_is_told_to_spawn(cuda):
    cuda.fails["cuInit"] = 3
    with pytest.raises(UnsupportedError, match=r"CUDA error 3.* start worker processes by spawn"):
        driver.device_info(0)


def test_a_driver_older_than_cuda_12_is_refused(cuda):
    del cuda.cuLaunchKernelEx
    with pytest.raises(UnsupportedError, match=r"driver: the driver must support CUDA 12; got one without .*cuLaunchK"):
        driver.device_info(0)


def test_constants_agree_with_the_bindings():
    bindings = pytest.importorskip("cuda.bindings.driver")
    attribute = bindings.CUdevice_attribute
    named = {
        driver._CLOCK_RATE_KHZ: attribute.CU_DEVICE_ATTRIBUTE_CLOCK_RATE,
        driver._MULTIPROCESSORS: attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
        driver._MEMORY_CLOCK_KHZ: attribute.CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE,
        driver._BUS_WIDTH_BITS: attribute.CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH,
        driver._L2_BYTES: attribute.CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE,
        driver._CAPABILITY_MAJOR: attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
        driver._CAPABILITY_MINOR: attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        driver._SMEM_OPTIN_BYTES: attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
        loaded._MAX_DYNAMIC_SMEM: bindings.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
        driver._CAPTURE_MODE_RELAXED: bindings.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED,
        driver._CAPTURE_ACTIVE: bindings.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_ACTIVE,
        6: bindings.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
        4: bindings.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
        5: bindings.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_SCHEDULING_POLICY_PREFERENCE,
        1: bindings.CUclusterSchedulingPolicy.CU_CLUSTER_SCHEDULING_POLICY_SPREAD,
    }
    assert [(ours, int(theirs)) for ours, theirs in named.items() if ours != int(theirs)] == []
    result = bindings.CUresult
    assert [result(code).name for code in (driver._NO_DEVICE, driver._NOT_INITIALIZED)] == [
        "CUDA_ERROR_NO_DEVICE",
        "CUDA_ERROR_NOT_INITIALIZED",
    ]
    assert {result(code).name.removeprefix("CUDA_ERROR_") for code in loaded._IMAGE_ERRORS} == {
        "INVALID_IMAGE",
        "NO_BINARY_FOR_GPU",
        "INVALID_PTX",
        "UNSUPPORTED_PTX_VERSION",
        "INVALID_SOURCE",
        "NOT_SUPPORTED",
    }
    assert all(result(code).name for code in driver._EARLIER_ERRORS)


# Loading


def test_load_kernel_loads_in_relaxed_capture_mode_and_puts_the_mode_back(cuda):
    load()
    asked = ("attribute", 0x88, 8, 0)
    assert cuda.calls == [("mode", 2), ("load", b"image", OURS), ("function", 0x77, b"entry"), asked, ("mode", 0)]


@pytest.mark.parametrize("smem_bytes", [0, 49152, 200000])
def test_load_kernel_asks_for_its_shared_memory(cuda, smem_bytes):
    load(smem_bytes=smem_bytes)
    assert ("attribute", 0x88, 8, smem_bytes) in cuda.calls


@pytest.mark.parametrize("before", [OTHER, None])
def test_load_kernel_uses_the_context_of_its_gpu_and_gives_the_callers_back(cuda, before):
    cuda.context = before
    load(device_index=1)
    assert ("load", b"image", OURS + 1) in cuda.calls
    assert cuda.context == (before or OURS + 1)


def test_load_kernel_refuses_an_unknown_signature(cuda):
    with pytest.raises(ValueError, match=r"^load_kernel: signature may hold P, i, l, f and T; got dx\.$"):
        load("Pxid")


def test_load_kernel_says_what_to_install_for_code_newer_than_the_driver(cuda):
    cuda.version, cuda.fails["cuModuleLoadData"] = 12040, 200
    with pytest.raises(UnsupportedError) as caught:
        load(cubin=b"..Cuda compilation tools, release 13.5, V13.5.37..")
    assert str(caught.value) == (
        "load_kernel[entry]: the driver must take the machine code; got CUDA_ERROR_INVALID_IMAGE (device kernel image "
        "is invalid) from driver CUDA 12.4 for code of CUDA 13.5. Update the driver, or install the compiler of its "
        "version: pip install 'sparse-marlin[cuda12]' 'nvidia-cuda-nvrtc-cu12==12.4.*'."
    )


def test_load_kernel_asks_the_compiler_for_its_version_when_the_code_does_not_say(cuda, monkeypatch):
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: (13, 2))
    cuda.fails["cuModuleLoadData"] = 222
    with pytest.raises(UnsupportedError, match=r"driver CUDA 13\.0 for code of CUDA 13\.2\. Update .*nvrtc==13\.0\.\*"):
        load()


def test_load_kernel_names_the_gpu_when_the_code_is_for_another(cuda):
    cuda.fails["cuModuleLoadData"] = 200
    with pytest.raises(UnsupportedError, match=r"NVIDIA H100 80GB HBM3 runs code for compute capability 9\.0 only"):
        load(cubin=b"Cuda compilation tools, release 12.8, V12.8.1")


def test_toolkit_version_is_in_what_the_compiler_makes():
    cubin = compiler.compile_cubin('extern "C" __global__ void k() {}', name="k", arch="80").image
    assert loaded.toolkit_version(cubin) in (None, compiler.nvrtc_version())


@pytest.mark.parametrize(
    ("call", "code", "expected"),
    [
        (
            "cuModuleLoadData",
            2,
            "load_kernel[entry]: GPU 0 must load the kernel; got CUDA_ERROR_OUT_OF_MEMORY (out of memory). Free GPU "
            "memory.",
        ),
        (
            "cuModuleGetFunction",
            500,
            "load_kernel[entry]: the machine code must define the kernel; got CUDA_ERROR_NOT_FOUND (named symbol not "
            "found). marlin doctor checks driver, compiler and GPU.",
        ),
        (
            "cuFuncSetAttribute",
            1,
            "load_kernel[entry]: GPU 0 must grant 300000 bytes of shared memory; got CUDA_ERROR_INVALID_VALUE (invalid "
            "argument). marlin doctor checks driver, compiler and GPU.",
        ),
    ],
)
def test_load_kernel_gives_the_drivers_word(cuda, call, code, expected):
    cuda.fails[call] = code
    with pytest.raises(LaunchError) as caught:
        load(smem_bytes=300000)
    assert str(caught.value) == expected


# Launching


def test_launch_passes_every_argument_and_extent(cuda):
    cuda.types = (P, I, ctypes.c_float, ctypes.c_int64, I, P)
    kernel = load("PiflIP".replace("I", "i"), smem_bytes=70000)
    kernel.launch((5, 6, 7), 256, 0xABC, (2**47 + 16, -5, 0.5, -(2**40), 2**31 - 1, 0))
    assert cuda.launches == [
        Launch((5, 6, 7), (256, 1, 1), 70000, 0xABC, [], 0x88, OURS, [2**47 + 16, -5, 0.5, -(2**40), 2**31 - 1, None])
    ]


@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize("cluster", [0, 1, 4])
def test_launch_asks_for_early_start_and_for_clusters_spread_over_multiprocessors(cuda, pdl, cluster):
    cuda.types = (I,)
    load("i").launch((8, 1, 1), 32, 0, (1,), pdl=pdl, cluster=cluster)
    spread = [(4, cluster, 1, 1), (5, 1, 0, 0)] if cluster > 1 else []
    assert cuda.launches[0].attributes == [(6, 1, 0, 0)] * pdl + spread


def test_launch_uses_new_values_each_time_and_pdl_only_when_asked(cuda):
    cuda.types = (I, P)
    kernel = load("iP")
    for number, pdl in ((1, False), (2, True), (3, False)):
        kernel.launch((number, 1, 1), 32, 0, (number, 16 * number), pdl=pdl)
    assert [(launch.values, launch.grid[0], bool(launch.attributes)) for launch in cuda.launches] == [
        ([1, 16], 1, False),
        ([2, 32], 2, True),
        ([3, 48], 3, False),
    ]


def test_launch_without_arguments(cuda):
    load().launch((1, 1, 1), 32, 0, ())
    assert cuda.launches[0].values == []


def test_launch_sets_no_context_when_its_own_is_current(cuda):
    kernel = load()
    cuda.calls.clear()
    kernel.launch((1, 1, 1), 32, 0, ())
    assert cuda.calls == [] and cuda.launches[0].context == OURS


def test_launch_makes_its_context_current_and_gives_the_callers_back(cuda):
    kernel = load(device_index=1)
    cuda.calls.clear()
    kernel.launch((1, 1, 1), 32, 0, ())
    assert cuda.launches[0].context == OURS + 1
    assert cuda.calls == [("set", OURS + 1), ("set", OURS)]


def test_launch_from_many_threads_keeps_arguments_apart(cuda):
    cuda.types = (I, I)
    kernel = load("ii")

    def work(number: int) -> None:
        for step in range(50):
            kernel.launch((1, 1, 1), 32, 0, (number, 100 * number + step))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(tuple(launch.values) for launch in cuda.launches) == [
        (number, 100 * number + step) for number in range(4) for step in range(50)
    ]


def test_frozen_launches_are_the_same_each_time(cuda):
    cuda.types = (I, P)
    kernel = load("iP", smem_bytes=1000)
    given = {"pdl": True, "cluster": 2, "smem_bytes": 500}
    first, second = (kernel.freeze((number, 1, 1), 32, 7, (number, 16 * number), **given) for number in (1, 2))
    kernel.launch((3, 1, 1), 32, 7, (3, 48), **given)
    gc.collect()
    assert first() and second() and first()
    assert [(launch.grid[0], launch.values) for launch in cuda.launches] == [
        (number, [number, 16 * number]) for number in (3, 1, 2, 1)
    ]
    assert len({(launch.smem, launch.stream, tuple(launch.attributes)) for launch in cuda.launches}) == 1


def test_frozen_launches_leave_other_contexts_and_refusals_to_launch(cuda):
    kernel = load()
    again = kernel.freeze((1, 1, 1), 32, 0, ())
    cuda.context = OTHER
    assert not again() and not cuda.launches
    cuda.context = OURS
    cuda.fails["cuLaunchKernelEx"] = 700
    assert not again()
    del cuda.fails["cuLaunchKernelEx"]
    assert again() and len(cuda.launches) == 1
    with pytest.raises(LaunchError, match="arguments must fit the signature ''; got 1 arguments"):
        kernel.freeze((1, 1, 1), 32, 0, (1,))


def test_launch_error_names_kernel_grid_threads_and_shared_memory(cuda):
    kernel = load(smem_bytes=99)
    cuda.fails["cuLaunchKernelEx"] = 1
    with pytest.raises(LaunchError) as caught:
        kernel.launch((0, 1, 1), 128, 0, ())
    assert str(caught.value) == (
        "launch[entry]: GPU 0 must accept the launch; got CUDA_ERROR_INVALID_VALUE (invalid argument) for grid "
        "(0, 1, 1), 128 threads, 99 bytes of shared memory. marlin doctor checks driver, compiler and GPU."
    )


def test_launch_error_points_at_an_earlier_kernel(cuda):
    kernel = load()
    cuda.fails["cuLaunchKernelEx"] = 700
    with pytest.raises(LaunchError, match="An earlier kernel on this GPU failed; run with CUDA_LAUNCH_BLOCKING=1"):
        kernel.launch((1, 1, 1), 128, 0, ())


@pytest.mark.parametrize("args", [(), (1,), (1, 2, 3), (1, 2**31), (1, 1.5), (1, None)], ids=lambda args: str(args))
def test_launch_refuses_arguments_that_do_not_fit_the_signature(cuda, args):
    kernel = load("Pi")
    with pytest.raises(LaunchError) as caught:
        kernel.launch((1, 1, 1), 128, 0, args)
    assert str(caught.value).startswith(
        f"launch[entry]: arguments must fit the signature 'Pi'; got {len(args)} arguments {args}, grid (1, 1, 1), "
    )
    assert cuda.launches == []


def test_synchronize_waits_in_the_context_of_the_gpu(cuda):
    driver.synchronize(1)
    assert cuda.calls == [("set", OURS + 1), ("synchronize", OURS + 1), ("set", OURS)]
    cuda.fails["cuCtxSynchronize"] = 700
    with pytest.raises(
        LaunchError, match="synchronize: the work on GPU 1 must succeed; got CUDA_ERROR_ILLEGAL_ADDRESS"
    ):
        driver.synchronize(1)
    assert cuda.context == OURS


@pytest.mark.parametrize(("capture", "expected"), [((0, 99), 0), ((1, 99), 99), ((1, 2**40), 2**40), ((2, 99), 0)])
def test_current_capture_id_is_the_number_of_an_active_capture(cuda, capture, expected):
    cuda.capture = capture
    assert driver.current_capture_id(0xABC) == expected
    assert cuda.calls == [("capture", 0xABC)]


def test_current_capture_id_is_zero_when_the_driver_cannot_tell(cuda):
    cuda.capture = (1, 5)
    assert driver.current_capture_id(0) == 5
    cuda.fails["cuStreamGetCaptureInfo_v2"] = 906
    assert driver.current_capture_id(0) == 0
