"""One TOML file a model family; read by `kconvert.catalogue`.

    name, model_types   what `--like` calls it, and the `model_type` of the config.json files that it describes
    base                another manifest: everything is as there but what stands here; tables are merged key by key, and
                        `weights` and `tensors` entry by entry, by name
    weights             the Linears: name (of the module), role, shape [out, in]; any encoding may spell them. A shape
                        [experts, out, in] is that of stacked experts, as formats.stacks spells them
    tensors             everything else: name (whole), role, dtype, shape; never quantised
    dims                symbol = key of config.json (`a.b` leads into tables); shapes are expressions over the symbols
    defaults            symbol = expression for where config.json has no such key
    indices             placeholder = its numbers, [start, stop] or [start, stop, step]; or { list = key of config.json,
                        first = the number of its first layer }; `without` leaves out the numbers of another placeholder.
                        `layer.moe` counts on the axis `layer`.
    limits              key of config.json = an expression that bounds it, for samples smaller than the model
    optional_layers     a placeholder: the names in these layers are all there or all missing
    config, side_files, shard_name    what `kconvert sample` writes: the published model's config.json and names

An entry of `weights` or `tensors` may have `when` or `unless`, a key of config.json: there is such a tensor where the value is
true, or where it is not. It may be `optional`: true, or a key that makes it so; if config.json lacks a size of an optional
entry, the model has no such tensors.

A language model inside a larger one: `prefix` goes before the names of the base, `config_key` is the table of config.json that
describes it, and tensors whose names begin with one of `plain_prefixes` are copied without being known.

`stacked_method` is the `quant_method` of stacked experts, which their tensors' names tell by themselves; `open` accepts any
names at all.
"""
