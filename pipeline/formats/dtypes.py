"""The one table of dtypes: the codes of safetensors files, torch's dtypes, and the names that users write.

Takes a code ('BF16'), a torch dtype or a name ('bfloat16'); gives one of the other two, and a number's size.
"""

import torch

# Bits of one number, by safetensors' code.
ITEM_BITS = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
}
# Torch's dtype by safetensors' code: those that weights are computed with, and all that torch has.
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TORCH_DTYPES = FLOATS | {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
CODES = {dtype: code for code, dtype in TORCH_DTYPES.items()}

# The names that a configuration or a command line may give, and the codes of weights that are folded.
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
FOLDABLE = tuple(CODES[dtype] for dtype in DTYPES.values())


def dtype_name(dtype: torch.dtype) -> str:
    """torch.bfloat16 → 'bfloat16'."""
    return str(dtype).removeprefix("torch.")


def code_of(name: str) -> str:
    """'bfloat16' → 'BF16'."""
    return CODES[DTYPES[name]]


def name_of(code: str) -> str:
    """'BF16' → 'bfloat16'; a code that torch lacks as it is."""
    return dtype_name(TORCH_DTYPES[code]) if code in TORCH_DTYPES else code


def unit_roundoff(code: str) -> float:
    """The largest relative error of rounding to the dtype: 2⁻⁸ for 'BF16'."""
    return torch.finfo(FLOATS[code]).eps / 2
