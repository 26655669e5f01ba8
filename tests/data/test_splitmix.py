"""SplitMix64 against published numbers, and its two forms against each other."""

import numpy as np

from mocov3_ds.data import splitmix

# Numbers of the reference implementation (prng.di.unimi.it/splitmix64.c) by the generator's state.
PUBLISHED = {
    0: (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F),
    1234567: (
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ),
}
LARGEST = (1 << 64) - 1


def test_streams_are_the_published_ones() -> None:
    for state, words in PUBLISHED.items():
        assert splitmix.draw_words(len(words), state).tolist() == list(words)
        assert splitmix.hash_word(state) == words[0]


def test_a_word_is_the_first_number_of_its_stream() -> None:
    for state in (0, 1, 2**31, 2**63, LARGEST):
        assert splitmix.draw_words(1, state).tolist() == [splitmix.hash_word(state)]


def test_counters_are_hashed_one_after_the_other() -> None:
    hashed = splitmix.hash_word(splitmix.hash_word(splitmix.hash_word(7) + 3) + 5)
    assert splitmix.hash_counters(7, 3, 5) == hashed != splitmix.hash_counters(7, 5, 3)
    assert splitmix.hash_counters(7) == splitmix.hash_word(7)


def test_words_wrap_around_at_64_bits() -> None:
    assert splitmix.hash_word(LARGEST + 1) == splitmix.hash_word(0)
    assert splitmix.hash_word(-1) == splitmix.hash_word(LARGEST)


def test_a_permutation_holds_every_number_once_and_follows_its_stream() -> None:
    order_N = splitmix.draw_permutation(1000, LARGEST)
    assert order_N.dtype == np.int64 and sorted(order_N.tolist()) == list(range(1000))
    assert np.all(np.diff(splitmix.draw_words(1000, LARGEST)[order_N].astype(object)) > 0)
    assert splitmix.draw_permutation(0, 1).shape == (0,)
