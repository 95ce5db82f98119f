import os
import subprocess

import numpy as np
import pytest
import torch

from gen_accel.eval.fidelity import psnr
from gen_accel.eval.files import atomic, check_writable, write_text
from gen_accel.eval.video import read_video, side_by_side, to_uint8, write_video


def clip(frames=5, height=32, width=48):
    """A soft moving gradient: something a codec keeps well."""
    y = torch.linspace(0, 1, height)[:, None].expand(height, width)
    x = torch.linspace(0, 1, width)[None].expand(height, width)
    t = torch.linspace(0, 1, frames)[:, None, None, None]
    return (torch.stack([y, x, (y + x) / 2])[None] * 0.8 + 0.2 * t).clamp(0, 1)


@pytest.mark.parametrize("name", ["a.npy", "frames"])
def test_lossless_formats_come_back_equal(tmp_path, name):
    video = to_uint8(clip())
    write_video(tmp_path / name, video)
    assert torch.equal(read_video(tmp_path / name), video)


@pytest.mark.parametrize(("name", "floor"), [("a.mp4", 35), ("a.gif", 25)])
@pytest.mark.parametrize("size", [(32, 48), (30, 18)])
def test_lossy_formats_keep_size_count_and_picture(tmp_path, name, floor, size):
    video = clip(7, *size)
    write_video(tmp_path / name, video, fps=10)
    back = read_video(tmp_path / name)
    assert back.shape == video.shape and back.dtype == torch.uint8
    assert float(psnr(back, video)) > floor


def test_one_png(tmp_path):
    picture = to_uint8(clip(1))
    write_video(tmp_path / "a.png", picture)
    assert torch.equal(read_video(tmp_path / "a.png"), picture)
    with pytest.raises(ValueError, match="one frame and this video has 2"):
        write_video(tmp_path / "b.png", clip(2))


def test_grey_becomes_rgb(tmp_path):
    grey = to_uint8(clip())[:, :1]
    write_video(tmp_path / "grey", grey)
    assert torch.equal(read_video(tmp_path / "grey"), grey.expand(-1, 3, -1, -1))


def test_mp4_is_what_browsers_play(tmp_path):
    import imageio_ffmpeg

    write_video(tmp_path / "a.mp4", clip(), fps=12)
    probe = subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-i", tmp_path / "a.mp4"], capture_output=True, text=True
    ).stderr
    assert "h264" in probe and "yuv420p" in probe and "12 fps" in probe
    data = (tmp_path / "a.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


@pytest.mark.parametrize(
    ("name", "video", "message"),
    [
        ("a.avi2", clip(), r"'\.avi2'.*\.mp4"),
        ("a.mp4", clip(2, 31, 48), "31x48.*even"),
        ("a.mp4", clip()[None], "one by one"),
        ("a.mp4", clip() * 255, "divide by 255"),
        ("a.mp4", clip() * float("nan"), "nan"),
        ("a.mp4", clip().long(), "int64"),
        ("a.mp4", torch.zeros(0, 3, 8, 8), r"\(0, 3, 8, 8\)"),
    ],
)
def test_bad_videos_are_refused_and_nothing_is_written(tmp_path, name, video, message):
    with pytest.raises(ValueError, match=message):
        write_video(tmp_path / name, video)
    assert os.listdir(tmp_path) == []


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError), atomic(path) as scratch:
        scratch.write_text("half of the n")
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]
    write_text(path, "new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.txt"]


def test_a_full_folder_is_not_replaced(tmp_path):
    write_video(tmp_path / "frames", clip())
    with pytest.raises(ValueError, match="folder with files"):
        write_video(tmp_path / "frames", clip())
    assert len(os.listdir(tmp_path / "frames")) == 5 and os.listdir(tmp_path) == ["frames"]


def test_unwritable_places_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="cannot write to .*file"):
            check_writable(path)
    with pytest.raises(ValueError, match="cannot write to"):
        write_video(tmp_path / "file" / "a.mp4", clip())
    assert os.listdir(tmp_path) == ["file"]


def test_what_is_not_a_video_is_named(tmp_path):
    (tmp_path / "a.mp4").write_text("hello")
    (tmp_path / "empty").mkdir()
    np.save(tmp_path / "a.npy", np.zeros(3))
    for name in ("a.mp4", "empty", "a.npy", "none.mp4"):
        with pytest.raises(ValueError, match=name):
            read_video(tmp_path / name)


def test_side_by_side_places_every_video():
    left, right = to_uint8(clip()), 255 - to_uint8(clip())
    both = side_by_side([left, right], gap=6)
    assert both.shape == (5, 3, 32, 48 + 6 + 48)
    assert torch.equal(both[..., :48], left) and torch.equal(both[..., 54:], right)
    assert (both[..., 48:54] == 255).all()


def test_labels_stand_above_and_sizes_stay_even(tmp_path):
    videos = [clip(2, 31, 47)] * 3
    joined = side_by_side(videos, labels=["dense", "PARO", "other"], gap=3)
    assert joined.shape[2] % 2 == joined.shape[3] % 2 == 0
    top = joined.shape[2] - 31 - (joined.shape[2] - 31) % 2
    assert (joined[0, :, : top - 2, :47] < 128).any(), "the label is drawn"
    write_video(tmp_path / "a.mp4", joined)


def test_side_by_side_needs_equal_shapes():
    with pytest.raises(ValueError, match="no videos"):
        side_by_side([])
    with pytest.raises(ValueError, match="shapes"):
        side_by_side([clip(), clip(4)])
    with pytest.raises(ValueError, match="1 labels for 2"):
        side_by_side([clip(), clip()], labels=["a"])


def test_to_uint8_rounds():
    assert to_uint8(torch.tensor([0.0, 0.5 / 255 + 1e-4, 1.0])).tolist() == [0, 1, 255]
