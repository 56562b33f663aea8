"""Corrupted copies of photos."""

import numpy as np
from PIL import Image

from experiments.corrupt import main


def test_each_photo_is_corrupted_in_five_ways(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "test" / name).mkdir(parents=True)
        for index in range(2):
            pixels = rng.integers(256, size=(32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "test" / name / f"{index}.png")
    for target in ("one", "two"):
        assert main([str(tmp_path / "test"), str(tmp_path / target)]) == 0
    assert "20 images in" in capsys.readouterr().out
    files = sorted((tmp_path / "one").glob("*/*.png"))
    assert len({file.name.rpartition("_")[0] for file in files}) == 5
    for file in files:
        changed = np.asarray(Image.open(file), dtype=float)
        original = np.asarray(Image.open(tmp_path / "test" / file.parent.name / file.name.rpartition("_")[2]))
        assert 3 < abs(changed - original).mean() < 90
        assert file.read_bytes() == (tmp_path / "two" / file.relative_to(tmp_path / "one")).read_bytes()
    assert main([str(tmp_path / "test"), str(tmp_path / "one")]) == 1
    assert "one is there already" in capsys.readouterr().err
