import pytest
import torch

from gen_accel.eval.load import check_pair, find_clips, read_clip
from gen_accel.eval.video import write_video

VIDEO = torch.randint(0, 256, (4, 3, 16, 20), generator=torch.Generator().manual_seed(0)).byte()


@pytest.mark.parametrize(
    ("name", "fps"),
    [("a.mp4", 8), ("a.gif", 10), ("a.npy", None), ("a.pt", None), ("folder", None)],
)
def test_formats(tmp_path, name, fps):
    path = tmp_path / name
    if name == "a.pt":
        torch.save(VIDEO, path)
    else:
        write_video(path, VIDEO, fps=fps or 8)
    clip = read_clip(path)
    assert clip.frames.shape == VIDEO.shape and clip.path == path
    assert clip.fps == (pytest.approx(fps, rel=0.01) if fps else None)
    if name not in ("a.mp4", "a.gif"):
        assert torch.equal(clip.frames, VIDEO)


def test_float_arrays_and_a_batch_of_one(tmp_path):
    torch.save(VIDEO[None].float() / 255, tmp_path / "a.pt")
    assert torch.equal(read_clip(tmp_path / "a.pt").frames, VIDEO.float() / 255)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (VIDEO[0], "shape"),
        (VIDEO[:, :2], "1 or 3 channels"),
        (VIDEO.float(), "divide by 255"),
        (VIDEO.float() * float("nan"), "divide by 255"),
        ({"a": VIDEO}, "holds a dict"),
        (VIDEO[:0], "shape"),
    ],
)
def test_bad_tensors_are_refused(tmp_path, value, message):
    torch.save(value, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=message) as caught:
        read_clip(tmp_path / "a.pt")
    assert "\n" not in str(caught.value) and "a.pt" in str(caught.value)


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.npy", "a.pt", "a.png"])
@pytest.mark.parametrize("content", [b"", b"no video at all, only words " * 20])
def test_empty_and_corrupt_files_are_refused_in_one_line(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name) as caught:
        read_clip(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_folder_stands_for_its_clips_or_is_one(tmp_path):
    write_video(tmp_path / "set" / "b.mp4", VIDEO)
    write_video(tmp_path / "set" / "a", VIDEO)
    (tmp_path / "set" / "index.html").write_text("x")
    (tmp_path / "set" / ".hidden.mp4").write_text("x")
    assert list(find_clips(tmp_path / "set")) == ["a", "b"]
    assert list(find_clips(tmp_path / "set" / "a")) == ["a"]
    assert find_clips(tmp_path / "set" / "b.mp4") == {"b": tmp_path / "set" / "b.mp4"}
    write_video(tmp_path / "set" / "b.gif", VIDEO)
    with pytest.raises(ValueError, match="share a name"):
        find_clips(tmp_path / "set")
    (tmp_path / "none").mkdir()
    for path in (tmp_path / "none", tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=path.name):
            find_clips(path)


def test_pairs_must_agree(tmp_path):
    def clip(name, video, fps=8):
        write_video(tmp_path / name, video, fps=fps)
        return read_clip(tmp_path / name)

    reference = clip("r.mp4", VIDEO)
    check_pair(clip("same.mp4", VIDEO.flip(0)), reference)
    check_pair(clip("no-rate.npy", VIDEO), reference)
    for name, video, fps, message in (
        ("a.mp4", VIDEO[:3], 8, "3 frames, .* 4"),
        ("b.mp4", VIDEO[..., :18], 8, "16x18 pixels, .* 16x20"),
        ("c.mp4", VIDEO, 16, "16 frames per second, .* 8"),
    ):
        with pytest.raises(ValueError, match=message):
            check_pair(clip(name, video, fps), reference)
