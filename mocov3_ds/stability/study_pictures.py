"""Which pictures does the page of a study have, and where do their files lie?"""

from pathlib import Path

from mocov3_ds.monitoring.alarms import RMS_HIGH
from mocov3_ds.stability import curvature_figure, curve_figures, figures
from mocov3_ds.stability.drawing import write_png
from mocov3_ds.stability.pictures import Picture, PictureKind
from mocov3_ds.stability.study import Arms

PICTURES: tuple[PictureKind[Arms], ...] = (
    PictureKind(
        "accuracy",
        "Accuracy of all settings",
        "One colour an arm. Bold: the mean of its seeds, thin: each seed (of up to four arms), "
        "shaded: 95 % interval of the mean (cut at the frame: two or three seeds leave it wide).",
        curve_figures.draw_knn_over_epochs,
    ),
    PictureKind(
        "paired",
        "Seed by seed",
        "Final accuracy: points are seeds, bars are means. A grey line joins the runs of one seed, "
        "which share data order and initialisation.",
        curve_figures.draw_paired_arms,
    ),
    PictureKind(
        "loss_curves",
        "Loss of all settings",
        "As the accuracy above; of long runs the median of each stretch.",
        curve_figures.draw_loss_over_epochs,
    ),
    PictureKind(
        "spikes",
        "Spikes and dips on one time axis",
        "Largest gradient of the first and the last layer, below it k-NN with its dips shaded; "
        "thin lines are gradient events. The arms with most events, of each the seed with most.",
        curve_figures.draw_spikes_and_dips,
    ),
    PictureKind(
        "after_spikes",
        "What follows a spike",
        "Accuracy around all gradient spikes, as points from its running median. Grey: where the "
        "same spikes would lie if moved by whole windows; a dip that spikes make leaves it "
        "downwards.",
        curve_figures.draw_average_after_spikes,
    ),
    PictureKind(
        "knn",
        "k-NN accuracy, arm by arm",
        "Lines are seeds; dips beyond the curve's own noise are shaded.",
        figures.draw_knn,
    ),
    PictureKind(
        "loss",
        "Loss spikes",
        "Loss above the median of the 30 steps before; dots are jumps of more than 1 %.",
        figures.draw_losses,
    ),
    PictureKind(
        "layers",
        "Which layer, when",
        "Rows run from the input (top) to the output. Of each arm the seed with most events.",
        figures.draw_heat_map,
    ),
    PictureKind(
        "order",
        "First against last layer",
        "Median and quartiles over the gradient events of all seeds, aligned where each begins. "
        "The lead is the median over the events that both layers show.",
        figures.draw_events,
    ),
    PictureKind(
        "rms",
        "RMS of the first trained layer",
        f"Ticks are alarms (rule {figures.ALARM}), shades loss jumps, the dashed line is "
        f"{RMS_HIGH}.",
        figures.draw_rms,
    ),
    PictureKind(
        "rate",
        "Learning rate against accuracy",
        "Solid: patch projection trained; dashed: frozen.",
        figures.draw_rates,
    ),
    PictureKind(
        "trust",
        "Trust ratios",
        "LAMB fails smoothly: look for a ratio that drifts, not for a spike.",
        figures.draw_trust_ratios,
    ),
    PictureKind(
        "curvature",
        "Curvature of the loss and noise of its gradient",
        "One colour an arm, faint: its other seeds. Above a dashed limit a step of that size makes "
        "a quadratic loss grow. A noise scale that the noise hides (below 0) has no point.",
        curvature_figure.draw_curvature,
    ),
)


def write_pictures(arms: Arms, out: Path) -> list[Picture]:
    """Draw all pictures and write their files; an earlier file goes where nothing can be drawn."""
    pictures = []
    for kind in PICTURES:
        path, picture = out / f"{kind.name}.png", kind.make(arms)
        if picture.data is None:
            path.unlink(missing_ok=True)
        else:
            write_png(path, picture.data)
        pictures.append(picture)
    return pictures
