"""A fake accelerator for machines without one: real numbers on the CPU, the rules of a device, every event logged.

    with FakeDevice("cuda:0") as gpu:
        model.to("cuda"); swag = lb.SWAG(model); ...          # the library runs as on a GPU
        with gpu.section() as draws:
            posterior.sample(30)
    draws.num_syncs, draws.launches, draws.num_bytes

A tensor "on the device" is a wrapper (`OnDevice`) around an ordinary CPU tensor. To C++ it lies on ``meta``, so that
autograd, vmap and device guards ask for no driver; Python sees ``tensor.device == cuda:0`` and ``is_cuda``. A
TorchFunctionMode (`arguments`) turns ``device="cuda"`` of factories and of ``.to`` into that wrapper; a
TorchDispatchMode (`backend`) runs each operation on the CPU tensors inside, and refuses or notes (`rules`) what a
device would refuse or wait for:

* a CPU tensor with axes beside one on the device, or tensors of two devices: RuntimeError (CPU indices and copies are
  allowed, as on a GPU);
* a generator of another kind of device: RuntimeError;
* float64 where ``float64=False`` (Apple's MPS): TypeError;
* a pointer to the device's memory that is handed to the compiled CPU kernels: AssertionError;
* a value that the host reads (item, bool, tolist, nonzero, masks, equal, error checks of LAPACK, ...): a *sync*;
* a blocking copy from or to the host (``torch.tensor(x, device=...)`` too): a *sync* as well, of kind h2d or d2h;
* every other operation that is no view: one *launch*, with the bytes that it reads and writes.

``torch.autocast("cuda")`` and TF32 (``torch.set_float32_matmul_precision("high")``) round matrix products as a GPU
would. Unlike FakeTensorMode it goes on behind a sync (the number is there), backward passes work, and results can be
compared with those of the CPU. It cannot show the speed and the rounding of a GPU's kernels, races, limits of cuBLAS
and cuSOLVER, or the Triton kernel itself (a plain draw stands in for it, counted as one launch).
"""

from tests.fake_device.device import FakeDevice
from tests.fake_device.log import Section
from tests.fake_device.tensor import OnDevice, on_cpu

__all__ = ["FakeDevice", "OnDevice", "Section", "on_cpu"]
