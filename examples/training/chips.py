"""Peak rates of accelerators, from their vendors' specifications."""

from typing import Any, NamedTuple


class Chip(NamedTuple):
    """The peak rates of one device, per second."""

    flops: float
    """Dense bfloat16 FLOPs."""
    memory: float
    """Bytes read from or written to its memory."""
    links: float
    """Bytes received over all of its links to other devices. Vendors usually state
    twice as much, for both directions together."""
    source: str


_TPU = "docs.cloud.google.com/tpu/docs/"
_V4 = Chip(275e12, 1200e9, 300e9, f"{_TPU}v4, links: arXiv:2304.01433")
_V5E = Chip(197e12, 819e9, 200e9, f"{_TPU}v5e")
_V5P = Chip(459e12, 2765e9, 600e9, f"{_TPU}v5p")
_V6E = Chip(918e12, 1638e9, 400e9, f"{_TPU}v6e")
_NVIDIA = "NVIDIA's data sheet"

_CHIPS = {
    "TPU v4": _V4,
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    "TPU v5": _V5P,
    "TPU v5p": _V5P,
    "TPU v6 lite": _V6E,
    "TPU v6e": _V6E,
    "NVIDIA A100-SXM4-40GB": Chip(312e12, 1555e9, 300e9, _NVIDIA),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 2039e9, 300e9, _NVIDIA),
    "NVIDIA H100 80GB HBM3": Chip(989e12, 3350e9, 450e9, _NVIDIA),
    "NVIDIA H200": Chip(989e12, 4800e9, 450e9, _NVIDIA),
}


def chip_of(device: Any) -> Chip | None:
    """Return the peak rates of a device, or None if they are unknown."""
    return _CHIPS.get(device.device_kind)
