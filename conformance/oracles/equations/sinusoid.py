"""Sinusoidal positions, number by number, in float64."""

import math


def position_encoding(position: int, hidden_size: int, layout: str) -> list[float]:
    """One row of the table.  Vaswani et al. 2017 (arXiv:1706.03762), section 3.5.

        PE(pos, 2i) = sin(pos / 10000^(2i/d))    PE(pos, 2i+1) = cos(pos / 10000^(2i/d))

    layout: "interleaved", as the paper has it; "concatenated": all sines, then all cosines, each with i rising
        (Junczys-Dowmunt et al. 2018, Marian).  With an odd d there is one sine more.
    """
    sines, cosines = [], []
    for dimension in range(hidden_size):
        i = dimension // 2
        angle = position / math.pow(10000, 2 * i / hidden_size)
        if dimension % 2 == 0:
            sines.append(math.sin(angle))
        else:
            cosines.append(math.cos(angle))
    if layout == "concatenated":
        return sines + cosines
    return [(sines, cosines)[dimension % 2][dimension // 2] for dimension in range(hidden_size)]
