"""Folders of safetensors files, as tests write them."""

import json

from safetensors.torch import save_file

from cwfast.checkpoint.reader import INDEX


def write_folder(folder, tensors, shards=3):
    """Round-robin over ``shards`` files, with an index."""
    folder.mkdir(exist_ok=True)
    names = list(tensors)
    files = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({n: tensors[n].contiguous() for n in names if files[n] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder
