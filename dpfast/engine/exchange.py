"""Which examples are replaced by others, to see whether the rest stays as it is."""

import random


def exchanged_halves(examples: int) -> list[tuple[list[int], list[int]]]:
    """Two halves, chosen at random: for each the places of the others, which are kept, and what stands in each place.

    All that are replaced are replaced by one of those that are kept: in the sum over a batch, where others would only
    change places, that shows. The choice is the system's, not a generator's of the training.
    """
    chance, everyone = random.SystemRandom(), range(examples)
    half = set(chance.sample(everyone, examples // 2))
    exchanges = []
    for replaced in (half, set(everyone) - half):
        kept = [p for p in everyone if p not in replaced]
        instead = chance.choice(kept)
        exchanges.append((kept, [instead if p in replaced else p for p in everyone]))
    return exchanges
