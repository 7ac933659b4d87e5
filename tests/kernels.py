"""What tests of Triton kernels share. The interpreter is chosen before Triton is imported: what is marked `inside` runs in a new process."""
import os
import re
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch

triton = pytest.importorskip('triton')
interpreted = os.environ.get('TRITON_INTERPRET') == '1'
inside = pytest.mark.skipif(not interpreted, reason='run by test_in_the_interpreter')
outside = pytest.mark.skipif(interpreted, reason='needs the compiler')
gpu = pytest.mark.skipif(interpreted or not torch.cuda.is_available(), reason='needs a GPU')
layouts = torch.contiguous_format, torch.channels_last


def run_in_the_interpreter(file):
    "Run the tests of `file` that are marked `inside`; returns how many passed."
    env = os.environ | {'TRITON_INTERPRET': '1', 'PYTHONPATH': os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', file], env=env, text=True,
                         capture_output=True)
    found = re.search(r'(\d+) passed', run.stdout)
    assert run.returncode == 0 and found, run.stdout + run.stderr
    return int(found[1])


def compiled(kernel, tmp_path, types, constants, even=(), **options):
    """PTX of `kernel` for compute capability 9.0, and the registers and memory a thread uses; no GPU is needed.

    Pointers and the numbers named in `even` are multiples of 16, as tensors of PyTorch and usual widths are."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    signature = {o: 'constexpr' if o in constants else types.get(o, 'i32') for o in kernel.arg_names}
    places = [((i,), name, t) for i, (name, t) in enumerate(signature.items()) if not isinstance(t, tuple)]
    places += [((i, j), name, o) for i, (name, t) in enumerate(signature.items()) if isinstance(t, tuple) for j, o in enumerate(t)]
    multiples = {at: [['tt.divisibility', 16]] for at, name, t in places if t[0] == '*' or name in even}
    constants = {k: v for k, v in constants.items() if k in signature}
    asm = triton.compile(ASTSource(kernel, signature, constants, multiples), target=GPUTarget('cuda', 90, 32), options=options).asm
    (tmp_path/'kernel').write_bytes(asm['cubin'])
    dump = subprocess.run([triton.knobs.nvidia.cuobjdump.path, '-res-usage', tmp_path/'kernel'], text=True, capture_output=True)
    return asm['ptx'], {k: int(v) for k, v in re.findall(r'(REG|STACK|LOCAL):(\d+)', dump.stdout)}


@contextmanager
def on_the_cpu(register, *ops):
    "Kernels in place of the CPU's bodies of `ops`."
    before = [op._backend_fns.get('cpu', op._init_fn) for op in ops]
    register('cpu')
    try: yield
    finally:
        for op, body in zip(ops, before): op.register_kernel('cpu')(body)
