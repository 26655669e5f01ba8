"""A kind of card's reach, as it is told."""

from mocov3_ds.planning import reach


def test_a_reach_says_what_it_rests_on_and_how_sure_it_is() -> None:
    assert str(reach.A100) == (
        "0.60: NVIDIA NeMo's ViT-g/14 and DINOv2's ViT-L/16, a step within 1.35 x either way"
    )
    assert str(reach.MACHINE) == "1.00: assumed; --calibrate measures this machine"


def test_what_was_never_published_is_less_sure() -> None:
    assert reach.ASSUMED.spread > reach.HOPPER.spread > 1
    assert reach.AD102.elementwise > reach.EAGER
