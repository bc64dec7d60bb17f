"""Generated pictures: what the class is, and that no linear classifier finds it."""

from collections import Counter

import pytest
import torch

from astbench.tasks.images import demo


def test_the_class_is_the_kind_of_the_shape_that_has_the_marks_colour(monkeypatch):
    shapes, drawn = [], demo._shape
    monkeypatch.setattr(
        demo, "_shape", lambda kind, *place: shapes.append((kind, drawn(kind, *place))) or shapes[-1][1]
    )
    others = second = 0
    for seed in range(60):
        shapes.clear()
        picture, label = demo.generate(seed)
        mark = picture[:, : demo.MARK, : demo.MARK].float().mean((1, 2))
        near = [(picture[:, mask].float().mean(1) - mark).norm() for _, mask in shapes]
        assert label == shapes[int(near[1] < near[0])][0]
        assert abs(near[0] - near[1]) > 50  # the two colours differ
        assert not (shapes[0][1] & shapes[1][1]).any()  # nothing lies over something else
        assert not any(mask[: demo.MARK, : demo.MARK].any() for _, mask in shapes)
        second += int(near[1] < near[0])
        others += shapes[0][0] != shapes[1][0]
    assert 15 < second < 45  # either is asked for
    assert others > 30  # the other shape would mostly be a wrong answer


def test_shapes_are_what_they_are_called():
    centre, area = torch.tensor([15.0, 15.0]), {}
    for kind, name in enumerate(demo.CLASSES):
        mask = demo._shape(kind, centre, 5.0)
        area[name] = int(mask.sum())
        assert torch.equal(mask, mask.flip(1).roll(-1, 1))  # mirrored about column 15
        assert bool(mask[15, 15]) == (name != "ring")
    assert area["square"] == 121 and area["cross"] == 57 and area["disc"] == 81
    triangle = demo._shape(2, centre, 5.0).sum(1)
    assert triangle[10] == 1 and triangle[20] == 11 and triangle[9] == triangle[21] == 0


def test_a_picture_is_a_function_of_its_seed_and_classes_are_balanced():
    (one, label), (two, again), (other, _) = (demo.generate(seed) for seed in (7, 7, 8))
    assert one.dtype == torch.uint8 and one.shape == (3, 32, 32)
    assert torch.equal(one, two) and label == again and not torch.equal(one, other)
    counts = Counter(demo.generate(seed)[1] for seed in range(500))
    assert sorted(counts) == [*range(5)] and min(counts.values()) > 70


def fitted(pictures, labels, ridge):
    """Ridge regression on all pixels, one column a class: guesses of new pictures."""
    wanted = torch.nn.functional.one_hot(labels).double() - 1 / (int(labels.max()) + 1)
    x = pictures.double().flatten(1) / 255 - 0.2
    weights = torch.linalg.solve(x @ x.T + ridge * torch.eye(len(x)).double(), wanted)
    return lambda new: ((new.double().flatten(1) / 255 - 0.2) @ (x.T @ weights)).argmax(1)


@pytest.mark.parametrize("ridge", [10.0, 300.0])
def test_a_linear_classifier_of_pixels_does_not_learn_it(ridge):
    rows = [demo.generate(seed) for seed in range(1400)]
    pictures, labels = torch.stack([p for p, _ in rows]), torch.tensor([label for _, label in rows])
    marks = pictures[:, :, :4, :4].float().mean((2, 3))
    colours = (marks[:, None] - torch.tensor(demo.COLOURS)).norm(dim=-1).argmin(1)
    right = {}
    for name, wanted in (("kind", labels), ("colour of the mark", colours)):
        guess = fitted(pictures[:1000], wanted[:1000], ridge)
        right[name] = float((guess(pictures[1000:]) == wanted[1000:]).float().mean())
    assert right["kind"] < 0.4  # one in five by chance
    assert right["colour of the mark"] > 0.95  # the same fit, asked for what pixels say
