"""Reading machine code, and what is derived from it."""

from __future__ import annotations

import pytest
import torch

from spectriton_kernels._launch import Launch
from spectriton_kernels.roof import Work, repeats, resident
from spectriton_kernels.sass import parse

pytestmark = pytest.mark.triton

CODE = """
.text.some_kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/              @!P0 LDG.E.128 R8, desc[UR6][R18.64] ;
        /*0020*/                   LDG.E.U8 R4, desc[UR6][R18.64] ;
        /*0030*/                   FFMA R6, R8, R8, R9 ;
        /*0040*/               @P1 BRA `(.L_x_1) ;
        /*0050*/                   STG.E.64 desc[UR6][R20.64], R8 ;
.L_x_1:
        /*0060*/               @P2 BRA `(.L_x_0) ;
        /*0070*/                   STG.E desc[UR6][R20.64], R8 ;
        /*0080*/                   LDG.E.U16 R4, desc[UR6][R18.64] ;
        /*0090*/                   EXIT ;
.L_x_2:
        /*00a0*/                   BRA `(.L_x_2);
        /*00b0*/                   NOP;
$some_kernel$__cuda_sm20_div_rn_f64_full:
        /*00c0*/                   DMUL R2, R2, R4 ;
"""


def test_instructions_widths_and_loops():
    instructions = parse(CODE)
    assert [i.opcode for i in instructions if i.in_loop] == [
        "LDG.E.128", "LDG.E.U8", "FFMA", "BRA", "STG.E.64", "BRA",
    ]  # fmt: skip
    assert [i.name for i in instructions if not i.in_loop] == ["LDC", "STG", "LDG", "EXIT", "BRA", "NOP"]
    assert [i.nbytes for i in instructions if i.name in ("LDG", "STG")] == [16, 1, 8, 4, 2]
    with pytest.raises(ValueError, match="no instructions"):
        parse("nothing")


def test_repeats_of_a_loop():
    launch = Launch(test_repeats_of_a_loop, (1,), (), {"BLOCK": 128})

    def work(passes: int, needed: int) -> Work:
        return Work(
            (), 0, lambda tile: 0, lambda tile: 0, passes=lambda launch: passes, in_pass=lambda meta: ("FFMA", needed)
        )

    # one FFMA in the loop for each of 32 threads: a pass of 32 is one iteration, a pass of 16 half of one
    assert repeats(parse(CODE), work(6, 32), launch, 32) == 6
    assert repeats(parse(CODE), work(6, 16), launch, 32) == 3
    with pytest.raises(ValueError, match="has a loop"):
        repeats(parse(CODE), work(0, 0), launch, 32)
    straight = [i for i in parse(CODE) if not i.in_loop]
    assert repeats(straight, work(0, 0), launch, 32) == 0
    with pytest.raises(ValueError, match="has no loop"):
        repeats(straight, work(6, 32), launch, 32)


def test_resident_programs():
    assert resident(32, 0, 4) == 16  # by warps
    assert resident(16, 0, 1) == 32  # by number
    assert resident(128, 0, 4) == 4  # by registers
    assert resident(129, 0, 4) == 3
    assert resident(32, 100 * 1024, 4) == 2  # by shared memory


def test_examples_of_the_table_exist():
    from spectriton_kernels.configs import TUNABLES
    from spectriton_kernels.registry import examples
    from spectriton_kernels.roof import WORK

    names = {example.name: example for example in examples()}
    assert list(WORK) == list(TUNABLES)
    for kernel, work in WORK.items():
        for name in work.examples:
            launch = names[name].plan(None)
            assert launch.kernel.__name__ == f"{kernel}_kernel"
            assert isinstance(launch.args[work.operand], torch.Tensor)
