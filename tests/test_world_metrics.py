"""The figures of demo/world_metrics.py: colours, probes, and its tasks on a few frames."""

import json
import sys

import numpy as np
import pytest
import torch
from conftest import rendered_world, write_video
from PIL import Image

import data
import sample
import sdit


@pytest.fixture(scope="module")
def metrics(world):
    import world_metrics

    return world_metrics


def run(metrics, *words):
    """The command line in this process; the JSON of its last line is printed for `capsys`."""
    before = sys.argv
    sys.argv = ["world_metrics.py", *map(str, words)]
    try:
        metrics.main()
    finally:
        sys.argv = before


def result(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_cielab_of_known_colours(metrics):
    """Values of the sRGB primaries under D65, as tables give them."""
    assert np.allclose(metrics.lab([255, 255, 255]), [100, 0, 0], atol=0.1)
    assert np.allclose(metrics.lab([255, 0, 0]), [53.24, 80.09, 67.20], atol=0.2)
    assert np.allclose(metrics.lab([0, 0, 255]), [32.30, 79.19, -107.86], atol=0.2)
    assert metrics.colour_distance([119, 119, 119], [0, 0, 0]) == pytest.approx(50.03, abs=0.2)


def test_colours_are_named_whatever_the_light(metrics, world):
    for table in (world.HAIR, world.CLOTH):
        for name, colour in table.items():
            for light in (0.85, 1, 1.08):
                assert metrics.nearest_colour(light * np.array(colour), table) == name, light


def test_colours_of_true_renderings_are_named_right(metrics, world, landmarker):
    """Also their error is 0 beside themselves, and the wrong colour has another name."""
    for seed in (0, 3):
        person, _, rng = metrics.sample_faces(seed, False)
        motion = world.sample_motion(rng, 2)
        frames = world.render_clip(person, motion, metrics.RENDER)
        tracked = data.track(frames, landmarker, "a person")
        case = metrics.RenderedCase(None, None, None, face=person, motion=motion, square=tracked.square)
        true = case.render(128)
        masks = case.masks(true, landmarker)
        assert all(set(mask) == {"hair", "shirt", "back", "skin"} for mask in masks)
        assert all(0.01 < mask["skin"].mean() < 0.15 for mask in masks)

        scores = metrics.colour_scores(true, true, masks, person)
        assert scores["hair_right"] == scores["back_right"] == 1
        assert scores["skin_error"] == scores["hair_error"] == scores["back_error"] == 0
        green = person | dict(back="green" if person["back"] != "green" else "red")
        other = metrics.colour_scores(case.render(128, green), true, masks, person)
        assert other["back_right"] == 0 and other["back_error"] > 15 and other["skin_error"] < 1


def test_ridge_recovers_a_linear_map(metrics):
    rng = np.random.default_rng(0)
    x, weight = rng.normal(3, 2, (80, 120)), rng.normal(size=(120, 2))
    y = x @ weight + 5
    assert np.allclose(metrics.Ridge(x, y, 1e-9)(x), y, atol=1e-3)
    x, noise = x[:, :10], rng.normal(size=(80, 2))
    fitted = metrics.Ridge(x[:60], x[:60] @ weight[:10] + 0.1 * noise[:60], 1e-4)
    assert np.allclose(fitted(x[60:]), x[60:] @ weight[:10], atol=0.5)
    assert np.allclose(metrics.Ridge(x, y, 1e9)(x), y.mean(0), atol=1e-3)  # only the mean


def test_the_grid_of_a_probe_moves_with_the_head(metrics, landmarker, clip):
    """Latents that are turned, sized and shifted with the face are read alike."""
    points = landmarker.landmarks(clip[0][0]) / 128
    probes = metrics.Probes.__new__(metrics.Probes)
    probes.mean_face = points
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    ramp = torch.stack([x, y])[None] / 64  # it knows where it is
    here = probes.around(ramp, points[None], "blink").reshape(2, -1)

    turned = points * np.float32([0.8, 0.8, 0.8]) + np.float32([0.1, 0.15, 0])
    there = probes.around(ramp, turned[None], "blink").reshape(2, -1)
    assert np.allclose(there, 0.8 * here + [[0.1], [0.15]], atol=0.01)
    eyes = points[data.RIGHT_EYE + data.LEFT_EYE, :2]
    assert (here.min(1) < eyes.min(0)).all() and (here.max(1) > eyes.max(0)).all()


def test_probes_read_what_latents_hold(metrics, landmarker, monkeypatch):
    """With the pictures themselves as latents; of people that they were fitted on."""

    class Pixels(torch.nn.Module):
        def encode(self, images):
            return torch.nn.functional.avg_pool2d(images, 4)

    models = sample.Models(None, Pixels(), None, landmarker, "", torch.device("cpu"))
    monkeypatch.setattr(sample.Models, "size", 64)
    probes, world, found = metrics.Probes(models, people=16), rendered_world(), []
    for seed in range(6):  # of the 16
        images, _, _, motion = world.sample_clip(seed, 2, metrics.RENDER, fps=1)
        tracked = data.track(images, landmarker, "a person")
        crops = np.stack([data.crop(image, tracked.square, 64) for image in images])
        found.append(probes.scores(metrics.encode(models, crops), tracked.landmarks, motion))
    assert np.mean([r for scores in found for r in scores.values()]) > 0.5      # 16 of these 19 right; of two frames each is 1 or -1


def test_controls(metrics, capsys):
    run(metrics, "--task", "controls", "--n", 5, "--frames", 2)
    found = result(capsys)
    assert found["found"] == 1 and found["n"] == 5
    assert found["simple"]["yaw"] > 0.9 and found["simple"]["roll"] > 0.9
    assert set(found["ridge"]) == set(rendered_world().CONTROLS)


def test_within_leaves_out_who_it_is(metrics):
    people = np.repeat([0, 1, 2], 4)
    moves = np.tile([0.0, 1, 2, 3], 3)
    assert metrics.within(moves + 10 * people, moves - 20 * people, people) == pytest.approx(1)


def test_reenact_stands_beside_its_ceilings(metrics, capsys, tmp_path):
    sheet = tmp_path / "sheet.png"
    run(metrics, "--n", 1, "--frames", 6, "--steps", 1, "--probes", 6, "--sheet", sheet)
    found = result(capsys)
    made, through, true = found["1 steps"], found["autoencoder"], found["true"]
    assert true["psnr"] > 90 and true["skin_error"] == 0 and true["found"] == 1
    assert made["psnr"] + 4 < through["psnr"] < 60  # it shows the truth
    assert made["skin_error"] > 0 and made["hair_error"] > 0
    probes = [name for name in made if name.startswith("probe_")]
    assert probes and set(probes) <= set(through) and all(np.isnan(true[name]) for name in probes)
    assert Image.open(sheet).size[0] > 9 * 64


def test_masks_of_a_photograph(metrics):
    """A face whose mesh is 0.4 wide and 0.52 high in the middle of the crop."""
    points = np.random.default_rng(0).uniform((0.3, 0.24, 0), (0.7, 0.76, 0), (478, 3))
    points[:2] = [[0.3, 0.24, 0], [0.7, 0.76, 0]]
    masks = metrics.photograph_masks(points, 100)
    y, x = np.nonzero(masks["hair"])
    assert (y.min(), y.max(), x.min(), x.max()) == (6, 15, 40, 59)
    y, x = np.nonzero(masks["background"])
    assert set(x) == {*range(18), *range(82, 100)} and (y.min(), y.max()) == (0, 36)


def test_real(metrics, world, capsys, tmp_path, monkeypatch):
    """Two videos and a picture are three sources and two drivers; what is no face is left out. A
    model that returned the photograph itself would have no distance."""
    for i in range(2):
        write_video(tmp_path / f"d{i}.mp4", world.sample_clip([9, i], 6, 192)[0])
    picture = world.sample_clip([9, 3], 1, 192)[0][0]
    Image.fromarray(picture).save(tmp_path / "s.png")
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "nobody.png")
    sheet = tmp_path / "sheet" / "sheet.png"
    sheet.parent.mkdir()

    def copies(models, source, landmarks, settings):
        return np.repeat(source[None], len(landmarks), 0)

    monkeypatch.setattr(metrics, "sample_images", copies)
    run(metrics, "--task", "real", "--clips", tmp_path, "--frames", 3, "--sheet", sheet)
    shown = capsys.readouterr()
    found = json.loads(shown.out.splitlines()[-1])
    assert found["pairs"] == 4 and "left out: no face found in" in shown.err
    assert found["near"] == dict.fromkeys(found["near"], 1.0)
    assert Image.open(sheet).size[0] * 4 == Image.open(sheet).size[1] * 3  # 3 columns, 4 rows

    def flashes(models, source, landmarks, settings):
        return np.stack([255 - source, *copies(models, source, landmarks, settings)[1:]])

    monkeypatch.setattr(metrics, "sample_images", flashes)
    run(metrics, "--task", "real", "--clips", tmp_path, "--frames", 3, "--n", 2)
    near = result(capsys)["near"]
    assert near["cheek"] == 1 and near["cheek_change"] == near["background_change"] == 0

    with pytest.raises(sdit.UserError, match="needs --clips"):
        run(metrics, "--task", "real")
