"""Weights and adapters in files, for every family of models.

``format`` is what a family states of its own: names, layouts, and which rows of which tensors a parameter is made
of. The rest is the same for all of them:

* ``plain``: the format of a family whose files are as its model is;
* ``rows``: what a tensor is made of; ``names``: prefixes and wrappers; ``shards``, ``torch_files``: which
  files a path means, and those of torch.save;
* ``reader``, ``writer``: weights, in any layout, whole or part by part;
* ``adapters``, ``adapter_names``, ``adapter_config``: LoRA out of files; ``adapter_fit``: for the layers of a model;
  ``adapter_export``: into files.
"""
