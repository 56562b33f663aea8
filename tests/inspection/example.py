"""A small plausible RoutingStatistics for tests of what shows them: `example_statistics()`."""

import numpy as np

from vmoe.inspection.results import LayerStatistics, RoutingStatistics, SampleRouting, TokenRouting, TypicalPatch

WORDS = ["<start_of_text>", "red", "app…", "le", "cat", "house", "<end_of_text>"]


def example_statistics(
    num_layers=2,
    num_experts=8,
    num_selected_experts=1,
    num_images=6,
    grid=4,
    side=48,
    num_classes=5,
    text=True,
    seed=0,
):
    """Random routing of `num_images` images (grid × grid patches) and, with `text`, their captions.

    The figures of the layers are those of the samples themselves, so that sums can be checked.
    """
    rng = np.random.default_rng(seed)
    E, K, L = num_experts, num_selected_experts, num_layers
    names = [f"class {c}" for c in range(num_classes)]
    samples = []
    for index in range(num_images):
        label = index % num_classes
        caption = " ".join(rng.choice(["red apple", "cat", "house"], 2)) if text else None
        words = [WORDS[0], *(w for word in (caption or "").split() for w in _pieces(word)), WORDS[-1]] if text else []
        samples.append(
            SampleRouting(
                image=_image(rng, side),
                path=f"images/{index:04d}.png",
                label=label,
                caption=caption,
                text_tokens=words,
                patches=[_routing(rng, (grid, grid), E, K, range(E // 2)) for _ in range(L)],
                text=[_routing(rng, (len(words),), E, K, range(E // 2 - 1, E)) for _ in range(L)] if text else [],
                top_classes=[(names[(label + i) % num_classes], p) for i, p in enumerate((0.7, 0.2, 0.1))],
                top_labels=[(label + i) % num_classes for i in range(3)],
            )
        )
    layers = [_layer(i, samples, E, K, num_classes, grid, text) for i in range(L)]
    agreement = np.full((L, L), 0.25) + 0.75 * np.eye(L)
    return RoutingStatistics(
        layers=layers,
        agreement={name: agreement.copy() for name in (("image", "text") if text else ("image",))},
        class_names=names,
        num_samples=num_images,
        num_skipped=0,
        samples=samples,
        sample_index=list(range(num_images)),
        texts_from="captions" if text else None,
        checkpoint="runs/example",
        weights_fingerprint="0" * 64,
        data="example images",
        data_fingerprint="1" * 64,
        versions={"torch": "2.0"},
    )


def _pieces(word):
    return ["app…", "le"] if word == "apple" else [word]


def _image(rng, side):
    y, x = np.mgrid[:side, :side] / side
    colours = rng.uniform(60, 255, (2, 3))
    return (colours[0] * x[..., None] + colours[1] * (1 - y[..., None])).clip(0, 255).astype(np.uint8)


def _routing(rng, shape, E, K, liked):
    """Each token's K experts; those in `liked` are likelier. A tenth of the assignments is dropped."""
    logits = rng.normal(size=(*shape, E))
    logits[..., list(liked)] += 3
    gates = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expert = np.argsort(-gates, axis=-1)[..., :K]
    weight = np.take_along_axis(gates, expert, -1).astype(np.float32)
    return TokenRouting(expert, weight, rng.random(expert.shape) > 0.1)


def _count(routings, E):
    asked = sum(np.bincount(r.expert.ravel(), minlength=E) for r in routings)
    kept = sum(np.bincount(r.expert[r.kept], minlength=E) for r in routings)
    importance = sum(np.bincount(r.expert.ravel(), r.weight.ravel(), minlength=E) for r in routings)
    return asked, kept, importance


def _layer(i, samples, E, K, C, grid, text):
    routings = {"image": [s.patches[i] for s in samples]} | ({"text": [s.text[i] for s in samples]} if text else {})
    counts = {name: _count(own, E) for name, own in routings.items()}
    expert_class = np.zeros((E, C), int)
    expert_token = {}
    typical = [[] for _ in range(E)]
    for index, sample in enumerate(samples):
        patches = sample.patches[i]
        expert_class[:, sample.label] += np.bincount(patches.expert[patches.kept], minlength=E)
        for e in range(E):
            weight = np.where((patches.expert == e) & patches.kept, patches.weight, 0).max(-1)
            row, column = np.unravel_index(weight.argmax(), weight.shape)
            if weight[row, column] > 0:
                side = len(sample.image) // grid
                pixels = sample.image[row * side : (row + 1) * side, column * side : (column + 1) * side]
                typical[e].append(TypicalPatch(index, int(row), int(column), float(weight[row, column]), pixels))
        if text:
            for position, word in enumerate(sample.text_tokens):
                words = sample.text[i]
                expert_token.setdefault(word, np.zeros(E, int))
                expert_token[word] += np.bincount(words.expert[position][words.kept[position]], minlength=E)
    return LayerStatistics(
        name=f"blocks.{2 * i + 1}.mlp",
        num_experts=E,
        num_selected_experts=K,
        router="top_k",
        eval_capacity_factor=1.0,
        batch_priority=True,
        tokens={name: sum(r.expert[..., 0].size for r in own) for name, own in routings.items()},
        asked={name: count[0] for name, count in counts.items()},
        kept={name: count[1] for name, count in counts.items()},
        importance={name: count[2] for name, count in counts.items()},
        entropy=dict.fromkeys(routings, 1.0),
        share_dropped={name: float(1 - count[1].sum() / count[0].sum()) for name, count in counts.items()},
        expert_class=expert_class,
        expert_token=expert_token,
        typical_patches=[sorted(own, key=lambda p: -p.weight) for own in typical],
    )
