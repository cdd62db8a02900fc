"""What a command line may choose of files' forms: dtypes of a result, schemes of a base in 4 or 8 bits, formats of an export.

Gives types, and their values as tuples; needs no torch, so that `--help` and a wrong option are answered at once.
tests/house/test_light_start.py holds them to `formats/dtypes.DTYPES`.
"""

from typing import Literal, get_args

Dtype = Literal["bfloat16", "float16", "float32"]
DTYPE_NAMES: tuple[Dtype, ...] = get_args(Dtype)
OutputDtype = Literal["keep", Dtype]
OUTPUT_DTYPES: tuple[OutputDtype, ...] = get_args(OutputDtype)
BaseQuant = Literal["nf4", "nf4-double"]
BASE_QUANTS: tuple[BaseQuant, ...] = get_args(BaseQuant)
RunQuant = Literal["nf4", "nf4-double", "int8"]
RUN_QUANTS: tuple[RunQuant, ...] = get_args(RunQuant)
ExportFormat = Literal["peft", "gguf"]
EXPORT_FORMATS: tuple[ExportFormat, ...] = get_args(ExportFormat)
DirectionMethod = Literal["abliteration", "householder"]
DIRECTION_METHODS: tuple[DirectionMethod, ...] = get_args(DirectionMethod)
