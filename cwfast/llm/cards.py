"""The model card of a rewound folder: what was done, by what, and what that does not promise. Nothing private."""

import math
from collections.abc import Mapping

from cwfast import _mask_view
from cwfast._mask_files import MaskFile
from cwfast.checkpoint.identity import identity

_PROMISES = """\
## What this is, and what it is not

- The selected weights hold the values of the base checkpoint, bit for bit. All other weights are those of the
  fine-tuned model. `cwfast-rewound.json` has the SHA-256 of each tensor.
- **This is no privacy guarantee.** Nothing here is differentially private. The weights that were not selected were
  trained on the same texts, and still tell of them. How well membership inference works on this model must be measured:
  `cwfast audit-llm`. This card has no result of such an attack.
- Rewinding alone costs some of what fine-tuning taught. The method goes on by fine-tuning the weights that were not
  selected; this folder is the model before that.
- Who has the fine-tuned model, or an artefact of its own values at these weights, can undo this.
- Where the criterion looks at training texts, which weights were selected tells of them, too. cwfast writes no
  training text into any file here. Other files are copies of the fine-tuned model's (configuration, tokenizer, license
  and the like), whose content it does not read: look through them before you share this folder.
"""


def model_card(masks: MaskFile, base_id: str | None, base: Mapping[str, str]) -> str:
    """README.md of a folder that a rewind has made.

    Args:
        masks: what was rewound: a mask or an artefact.
        base_id: what the base is called on a hub; None where that was not told.
        base: SHA-256 of the base's tensors that have selected weights.
    """
    counts = masks.counts()
    numel = {name: math.prod(shape) for name, shape in masks.shapes.items()}
    total, all_of_it = sum(counts.values()), sum(numel.values())
    front = ["---", *([f'base_model: "{base_id}"'] if base_id else []), "tags:", "- cwfast", "- rewound", "---"]
    rows = [
        ("Base model", f"`{base_id}`" if base_id else "not recorded by name"),
        ("SHA-256 of the base's tensors with selected weights", f"`{identity(base)}`"),
        ("Rewound weights", f"{total:,} of {all_of_it:,}, {total / max(all_of_it, 1):.4%}"),
        ("Criterion of selection", f"`{masks.criterion}`" if masks.criterion else "not recorded"),
    ]
    if masks.zero_score_selected:
        rows.append(("Of these, selected with score 0", f"{masks.zero_score_selected:,}: such a score ranks nothing"))
    layers = _mask_view.counts_by("layer", counts, numel)
    lines = [
        *front,
        "",
        "# A fine-tuned model, some of its weights put back",
        "",
        "Made by cwfast: of a fine-tuned model, selected weights were put back to what they were in the base model.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {what} | {value} |" for what, value in rows),
        "",
        _PROMISES,
        "## Rewound weights by layer",
        "",
        "| layer | rewound | weights | share |",
        "|---|---:|---:|---:|",
        *(
            f"| `{key}` | {c.selected:,} | {c.numel:,} | {c.selected / max(c.numel, 1):.4%} |"
            for key, c in layers.items()
        ),
    ]
    return "\n".join(lines) + "\n"
