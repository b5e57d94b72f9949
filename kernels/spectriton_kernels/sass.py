"""Reading NVIDIA machine code, as `nvdisasm -c` prints it: instructions, loops, accesses to global memory."""

import re
from dataclasses import dataclass

_LABEL = re.compile(r"^(\.L_x_\d+):")
_FUNCTION = re.compile(r"^\$\w+")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*)")


@dataclass(frozen=True)
class Instruction:
    """One instruction: its opcode with modifiers, and whether it stands in a loop."""

    opcode: str
    in_loop: bool = False

    @property
    def name(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.split(".")[0]

    @property
    def nbytes(self) -> int:
        """Bytes that a thread moves with a load or a store."""
        width = re.search(r"\.(?:[US](8|16)|(64|128))\b", self.opcode)
        return int(width.group(1) or width.group(2)) // 8 if width else 4


def parse(text: str) -> list[Instruction]:
    """The instructions of a kernel in order.

    What it calls (the slow paths of divisions and square roots in double precision) comes after it and is left out.

    Raises:
        ValueError: there are none.
    """
    labels: dict[str, int] = {}
    opcodes: list[str] = []
    branches: list[tuple[int, str]] = []
    for line in text.splitlines():
        if _FUNCTION.match(line) and opcodes:
            break
        if label := _LABEL.match(line):
            labels[label.group(1)] = len(opcodes)
        elif found := _INSTRUCTION.match(line):
            if found.group(1).startswith("BRA") and (target := re.search(r"\.L_x_\d+", found.group(2))):
                branches.append((len(opcodes), target.group()))
            opcodes.append(found.group(1))
    if not opcodes:
        raise ValueError("no instructions")
    # A branch back to an earlier label closes a loop; one to itself is the trap after the end.
    loops = [(labels[label], place) for place, label in branches if labels.get(label, place) < place]
    return [
        Instruction(opcode, any(begin <= place <= end for begin, end in loops)) for place, opcode in enumerate(opcodes)
    ]
