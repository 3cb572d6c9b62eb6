"""How fast GPUs of several nodes exchange numbers, and what else a node has: of nodes that need not be here."""

from dataclasses import dataclass

BUCKET = 1 << 23  # numbers of a collective: more go in several, one after another


@dataclass(frozen=True)
class Node:
    """A server of GPUs, and its way to others of its kind.

    gpus: at most. within, between: bytes that a GPU sends in a second, while it receives as many, to GPUs of its node
    and, through a network card of its own, of others. hop_within, hop_between: seconds that a message takes, however
    small. reading: bytes of examples in a second, from files to a GPU; entropy: random bytes of the system in a second.
    noise: normal numbers that a GPU draws in a second. reserved: bytes of a GPU that no tensor can have.
    """

    gpus: int
    within: float
    between: float
    hop_within: float
    hop_between: float
    reading: float
    entropy: float
    noise: float
    reserved: int

    def bandwidth(self, nodes: int, gpus_per_node: int) -> float:
        """Bytes that a GPU sends in a second in a ring through all of them.

        As many rings as a node has network cards in use share the numbers out, and each leaves the node by another
        card: what a GPU sends within is limited by NVLink, and by all cards together.
        """
        if nodes == 1:
            return self.within
        return self.between if gpus_per_node == 1 else min(self.within, gpus_per_node * self.between)

    def collective(self, numbers: int, nodes: int, gpus_per_node: int) -> float:
        """Seconds of a reduce-scatter, or of an all-gather, of so many float32, in rings: bucket after bucket."""
        ranks = nodes * gpus_per_node
        hop = self.hop_within if nodes == 1 else self.hop_between
        buckets = -(-numbers // BUCKET)
        return buckets * (ranks - 1) * hop + ring_bytes(numbers, ranks) / self.bandwidth(nodes, gpus_per_node)


def ring_bytes(numbers: int, ranks: int) -> int:
    """That a rank sends, and receives, in a reduce-scatter or an all-gather of so many float32, padded to a multiple of
    the ranks.
    """
    return 4 * (ranks - 1) * -(-numbers // ranks)


# Assumed, not measured. By NVIDIA's data sheets, 80% of which are taken to be reached:
#   HGX H200 (H200 Tensor Core GPU): 8 GPUs, NVLink 900 GB/s for each, which is 450 GB/s in one direction;
#   DGX H200: 8 ConnectX-7 for its 8 GPUs, of 400 Gb/s InfiniBand (NDR) each, which is 50 GB/s in one direction.
# By no data sheet: hops, of the order that NCCL's own model has; reading, one image at a time through the page cache
# (PCIe 5, 64 GB/s, is no limit); entropy, getrandom's ChaCha20 on one core; noise, from 150 integer operations of
# ChaCha20 and 100 of float64 for a number, at 15 and 17 T/s, with half of that reached; reserved, CUDA's context and
# NCCL's buffers.
HGX_H200 = Node(
    gpus=8,
    within=360e9,
    between=40e9,
    hop_within=5e-6,
    hop_between=15e-6,
    reading=1e9,
    entropy=3e8,
    noise=3e10,
    reserved=2 * 10**9,
)
NODES = {"h200": HGX_H200}  # by the GPU, as ``rates.DEVICES``
