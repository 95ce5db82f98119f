import pytest
import torch
import torch.nn.functional as F

from gen_accel.eval.fidelity import psnr
from gen_accel.eval.removal import background_psnr, foreground_flicker, tok_sim
from gen_accel.eval.temporal import flicker
from helpers.clips import drift, patch_tokens


def planted(height=70, width=80, frames=4, shift=(0, 0)):
    """A bright square on a texture, its mask, and the texture alone."""
    background = drift(frames=frames, size=max(height, width), shift=shift)[..., :height, :width]
    video, mask = background.clone(), torch.zeros(frames, height, width, dtype=torch.bool)
    for t in range(frames):
        mask[t, 30:42, 30 + 2 * t : 42 + 2 * t] = True
    video[mask[:, None].expand_as(video)] = 255
    return video, mask, background


def by_hand(video, reference, mask, network):
    """object_wiper.md 1.9 written out token by token."""
    scores = []
    for f in range(len(video) - 1):
        union = mask[f] | mask[f + 1]
        ys, xs = union.nonzero(as_tuple=True)
        height, width = union.shape
        y0, x0 = max(0, int(ys.min()) - 24), max(0, int(xs.min()) - 24)
        y1, x1 = min(height - 1, int(ys.max()) + 24), min(width - 1, int(xs.max()) + 24)
        crops = [v[:, y0:y1, x0:x1].float() / 255 for v in (video[f], video[f + 1], reference[f])]
        p, q, g = (F.normalize(network(c[None])[0], dim=-1).reshape(-1, 5) for c in crops)
        grids = []
        for m in (union, mask[f]):
            m = m[y0:y1, x0:x1].float()[None, None]
            grids.append(F.interpolate(m, (4, 4), mode="nearest")[0, 0].bool().flatten().tolist())
        tokens = [i for i in range(16) if grids[0][i]]
        outside = [i for i in range(16) if not grids[0][i]]
        first = [i for i in range(16) if grids[1][i]]
        fill = sum(float(p[i] @ g[i]) for i in first) / len(first)
        total = 0.0
        for i in tokens:
            consistency = float(p[i] @ q[i])
            coherence = sum(float(p[i] @ p[b]) for b in outside) / len(outside)
            eta = float(p[i] @ g[i]) if grids[1][i] else fill
            total += consistency * coherence * (1 - eta)
        scores.append(100 * total / len(tokens))
    return scores


def test_tok_sim_token_by_token():
    reference, mask, background = planted(shift=(2, 1))
    wanted = by_hand(background, reference, mask, patch_tokens)
    ours = tok_sim(background, reference, mask, patch_tokens, per_frame=True)
    assert ours.tolist() == pytest.approx(wanted, abs=1e-4)
    assert float(tok_sim(background, reference, mask, patch_tokens)) == pytest.approx(
        sum(wanted) / len(wanted), abs=1e-4
    )
    assert min(wanted) > 1  # a vector of zeros would prove nothing


def test_tok_sim_of_the_input_is_zero_and_of_a_removal_is_not():
    reference, mask, background = planted()
    assert float(tok_sim(reference, reference, mask, patch_tokens)) == pytest.approx(0, abs=1e-4)
    assert float(tok_sim(background, reference, mask, patch_tokens)) > 1


def test_tok_sim_keeps_negative_similarities():
    reference, mask, background = planted()

    def opposite(crops):  # the object points away from everything else
        bright = F.adaptive_max_pool2d((crops == 1).all(1).float(), 4)
        return torch.stack([1 - 2 * bright, torch.full_like(bright, 0.1)], -1)

    # eta < 0 raises the score above consistency times coherence.
    kept = tok_sim(background, reference, mask, opposite)
    assert float(kept) > 100


def test_flat_paint_scores_what_the_docstring_warns_of():
    reference, mask, background = planted()
    flat = torch.full_like(background, 90)
    values = tok_sim(flat, reference, mask, patch_tokens)
    # consistency = coherence = 1, so that 100 (1 - eta) remains.
    p = F.normalize(patch_tokens(flat[:1] / 255)[0, 0, 0], dim=0)
    etas = []
    for f in range(len(mask) - 1):
        ys, xs = (mask[f] | mask[f + 1]).nonzero(as_tuple=True)
        rows = slice(max(0, int(ys.min()) - 24), min(69, int(ys.max()) + 24))
        columns = slice(max(0, int(xs.min()) - 24), min(79, int(xs.max()) + 24))
        g = F.normalize(patch_tokens(reference[f : f + 1, :, rows, columns] / 255)[0], dim=-1)
        first = F.interpolate(mask[f : f + 1, rows, columns][None].float(), (4, 4))[0, 0].bool()
        etas.append(float((g[first] @ p).mean()))
    wanted = 100 * (1 - sum(etas) / len(etas))
    assert float(values) == pytest.approx(wanted, abs=1e-3)


def test_tok_sim_leaves_out_pairs_without_a_value():
    reference, mask, background = planted(frames=5)
    mask[0], mask[3], mask[4] = False, False, False  # pairs: 0|1 no mask f, 2|3 fine, 3|4 empty
    values = tok_sim(background, reference, mask, patch_tokens, per_frame=True)
    assert values.isnan().tolist() == [True, False, False, True]
    clip = tok_sim(background, reference, mask, patch_tokens)
    assert float(clip) == pytest.approx(float(values[1:3].mean()))


def test_tok_sim_without_any_pair():
    reference, mask, background = planted()
    with pytest.raises(ValueError, match="tok_sim: no frame.*leave this clip out"):
        tok_sim(background, reference, torch.zeros_like(mask), patch_tokens)
    with pytest.raises(ValueError, match="tok_sim: no frame"):  # no background in the crop
        tok_sim(background, reference, torch.ones_like(mask), patch_tokens)


def test_tok_sim_sees_nothing_far_from_the_object():
    reference, mask, background = planted(height=70, width=200)
    far = background.clone()
    far[..., 150:] = 0
    assert float(tok_sim(far, reference, mask, patch_tokens)) == float(
        tok_sim(background, reference, mask, patch_tokens)
    )
    assert float(background_psnr(far, background, mask)) < 20


def test_background_psnr_by_hand():
    reference, mask, background = planted()
    assert float(background_psnr(reference, background, mask)) == 100  # all errors are masked
    assert float(psnr(reference, background)) < 30
    dim = background.double() / 255 * 0.5
    error = torch.where(mask[:, None], 0.4, 0.1).double()
    assert float(background_psnr(dim + error, dim, mask)) == pytest.approx(20, abs=1e-5)
    nowhere = torch.zeros_like(mask)
    assert torch.allclose(
        background_psnr(reference, background, nowhere, per_frame=True),
        psnr(reference, background, per_frame=True),
    )


def test_background_psnr_without_background():
    reference, mask, background = planted()
    mask[0] = True
    values = background_psnr(reference, background, mask, per_frame=True)
    assert values.isnan().tolist() == [True] + [False] * 3
    assert float(background_psnr(reference, background, mask)) == 100
    with pytest.raises(ValueError, match="background_psnr: no frame.*outside the mask"):
        background_psnr(reference, background, torch.ones_like(mask))


def test_foreground_flicker_by_hand():
    reference, mask, background = planted()
    everything = torch.ones_like(mask)
    assert float(foreground_flicker(reference, everything)) == pytest.approx(
        float(flicker(reference))
    )
    strobe = background.clone()
    strobe[::2, :, 30:42, 30:48], strobe[1::2, :, 30:42, 30:48] = 0, 255
    assert float(foreground_flicker(strobe, mask)) == 0.0
    outside = background.clone()
    outside[1::2, :, :20] = 0
    assert float(foreground_flicker(outside, mask)) == 1.0
    with pytest.raises(ValueError, match="foreground_flicker: no frame.*inside the mask"):
        foreground_flicker(reference, torch.zeros_like(mask))


def test_masks_are_masks():
    reference, mask, background = planted()
    for measure in (
        lambda m: background_psnr(background, reference, m),
        lambda m: foreground_flicker(background, m),
        lambda m: tok_sim(background, reference, m, patch_tokens),
    ):
        with pytest.raises(ValueError, match="mask of dtype torch.uint8: expected bool"):
            measure(mask.byte())
        with pytest.raises(ValueError, match="differ"):
            measure(mask[:, 1:])
