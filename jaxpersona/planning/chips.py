"""Published accelerator specifications, and abstract TPU devices for AOT compilation."""

from __future__ import annotations

import dataclasses
import os
import re

from jaxpersona.errors import UserError
from jaxpersona.extras import installed
from jaxpersona.runtime import Device

GB = 10**9
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published specifications of one chip.

    Attributes:
      name: the chip's name in a topology, such as "v5e".
      memory: device memory in bytes.
      bandwidth: memory bandwidth in bytes/s.
      peak: peak dense bfloat16 FLOP/s.
      link: interconnect bandwidth per chip in bytes/s, over all links, in one direction.
      source: the publication that contains these specifications.
    """

    name: str
    memory: int
    bandwidth: float
    peak: float
    link: float
    source: str


_TPU = "cloud.google.com/tpu/docs/{}"
_NVIDIA = "NVIDIA datasheet {}"
CHIPS = {chip.name: chip for chip in (
    Chip("v5e", 16 * GIB, 819 * GB, 197e12, 200 * GB, _TPU.format("v5e")),
    Chip("v5p", 95 * GIB, 2765 * GB, 459e12, 600 * GB, _TPU.format("v5p")),
    Chip("v6e", 32 * GIB, 1640 * GB, 918e12, 448 * GB, _TPU.format("v6e")),
    Chip("a100", 80 * GB, 2039 * GB, 312e12, 300 * GB, _NVIDIA.format("A100 80GB SXM")),
    Chip("h100", 80 * GB, 3350 * GB, 989e12, 450 * GB, _NVIDIA.format("H100 SXM")),
    Chip("h200", 141 * GB, 4800 * GB, 989e12, 450 * GB, _NVIDIA.format("H200 SXM")),
)}
TPUS = ("v5e", "v5p", "v6e")
EXAMPLES = "v5e:4x4, v5p:2x2x2, v6e:2x4 or h200:8"


def parse(topology: str) -> tuple[Chip, int]:
    """Parse a topology such as v5e:4x4 and return its chip and its number of chips.

    Raises:
      UserError: the topology is not of the form chip:extents, the chip is not in `CHIPS`, or an
        extent is 0.
    """
    if not isinstance(topology, str):
        raise UserError(f"topology is {topology!r:.60}; use chip:extents, such as {EXAMPLES}")
    matched = re.fullmatch(r"(\w+):(\d{1,9}(?:x\d{1,9}){0,9})", topology)
    if matched is None:
        raise UserError(f"topology is {topology!r}; use chip:extents, such as {EXAMPLES}")
    name, extents = matched.group(1).lower(), [int(n) for n in matched.group(2).split("x")]
    if name not in CHIPS:
        raise UserError(f"topology is {topology!r}; supported chips are {', '.join(CHIPS)}")
    count = 1
    for extent in extents:
        count *= extent
    if not count:
        raise UserError(f"topology is {topology!r}; every extent must be at least 1")
    return CHIPS[name], count


def tpu_devices(topology: str) -> list[Device] | None:
    """Return the devices of a TPU topology for AOT compilation, or None if libtpu is missing.

    The function sets environment variables of libtpu unless they are already set.

    Raises:
      UserError: libtpu does not support the topology.
    """
    if not installed("libtpu"):
        return None
    # without these variables, libtpu queries the network for this machine's TPU
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # safe, because no TPU is opened
    from jax.experimental import topologies

    try:
        # a host has 2 × 2 chips, or fewer in topologies of 1 or 2 chips
        extents = [int(n) for n in topology.split(":")[1].split("x")]
        bounds = [*(min(n, 2) for n in extents[:2]), 1, 1][:3]
        description = topologies.get_topology_desc(platform="tpu", topology_name=topology,
                                                   chips_per_host_bounds=bounds)
    except Exception as error:  # libtpu raises errors of various types
        reason = str(error).split(": ", 1)[-1].splitlines()[0].rstrip(".")
        raise UserError(f"topology is {topology!r}, which libtpu does not support ({reason}); use "
                        f"a topology such as {EXAMPLES}") from error
    return list(description.devices)
