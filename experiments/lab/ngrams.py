"""How well a text can be told by counting: interpolated n-grams, beside which a network's bits a character stand."""

import numpy as np


def ngram_bits(train: np.ndarray, test: np.ndarray, num: int, most: int) -> np.ndarray:
    """Bits a symbol of a text by the n-grams of another, n = 1, ..., `most`, smoothed by Witten and Bell's method.

    `p_n(c | h) = [N(h c) + T(h) p_(n-1)(c | h')] / [N(h) + T(h)]`, N the counts in the first text, T the number of
    different symbols that were seen behind h, h' the history without its first symbol, and p_0 = 1 / num. A history
    that was never seen says what the shorter one says.

    Args:
        train: symbols [n], integers from 0.
        test: symbols [m].
        num: of different symbols.
        most: the longest n.

    Returns:
        Float64 [most].

    References:
        Witten & Bell 1991, "The zero-frequency problem"; Chen & Goodman 1998, "An empirical study of smoothing
        techniques for language modeling", section 2.6.

    Example:
        >>> ngram_bits(np.array([0, 1, 0, 1, 0, 1]), np.array([0, 1]), num=2, most=2).round(2)
        array([1. , 0.6])
    """
    both, cut = np.concatenate([train, test]).astype(np.int64), len(train)
    p, bits = np.full(len(test), 1 / num), []
    history = np.zeros(len(both), np.int64)  # which one, by number: at first the empty one
    for n in range(1, most + 1):
        whole = history * num + both
        seen, first, counts = np.unique(whole[n - 1 : cut], return_index=True, return_counts=True)
        total = np.bincount(history[n - 1 : cut], minlength=history.max() + 1)
        kinds = np.bincount(history[n - 1 : cut][first], minlength=history.max() + 1)
        inside = np.arange(len(test)) >= n - 1  # the whole history is of this text
        at, of = whole[cut:], history[cut:]
        place = np.minimum(np.searchsorted(seen, at), max(len(seen) - 1, 0))
        count = np.where(seen[place] == at, counts[place], 0) if len(seen) else np.zeros(len(test))
        weight = total[of] + kinds[of]
        p = np.where(inside & (weight > 0), (count + kinds[of] * p) / np.maximum(weight, 1), p)
        bits.append(-np.log2(p).mean())
        # The history of the next order at i: the n symbols before it.
        named = np.unique(whole, return_inverse=True)[1].reshape(-1)
        history = np.concatenate([np.zeros(1, np.int64), named[:-1]])
    return np.asarray(bits)
