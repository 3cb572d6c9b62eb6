# The compiled module (csrc/bindings.cpp). Pointers are integers, sizes and strides count elements.
abi: int
openmp: bool
compiler: str

def affine_grads(
    a: int,
    a_stride: tuple[int, int, int, int],
    g: int,
    g_stride: tuple[int, int, int, int],
    size: tuple[int, int, int, int],
    weight: int,
    bias: int,
    threads: int,
) -> None: ...
