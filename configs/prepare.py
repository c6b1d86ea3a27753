"""Every key of a preparation, with its default: videos and pictures to what training reads (docs/preparing.md).

Not meant to be run as it is (`model.path`, `source` and `output.path` are empty); the files prepare_*.py in this folder
override what differs.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()

    config.model = model = ConfigDict()
    model.path = ""  # folder of the model to prepare for (converted or diffusers): its VAE, tokenizer and text encoder
    model.dtype = "float32"  # of the VAE's weights and computation: float32 | bfloat16
    model.text_dtype = "bfloat16"  # the same of the text encoder

    config.source = source = ConfigDict()
    source.format = ""  # subjects200k | pexels | opens2v | folder | text_lists | metadata (docs/data_formats.md)
    source.path = ""  # where the set lies
    source.options = ConfigDict(convert_dict=False)  # settings of that format, such as minimum_score

    config.output = output = ConfigDict()
    output.path = ""  # the folder to make or to go on with; its name is the dataset's: letters, digits and _
    output.dtype = "float16"  # of stored moments and embeddings: float32 | float16 | bfloat16 (not numpy's own)
    output.text = "embeddings"  # embeddings | token_ids (for training the text encoder, text.train_encoder)

    config.samples = samples = ConfigDict()
    samples.buckets = ()  # sizes as "FRAMESxHEIGHTxWIDTH", 1 frame for pictures: ("49x480x720", "1x480x720")
    samples.fps = 0.0  # frames per second of clips; 0 = every frame of the file
    samples.window = "first"  # of a longer clip: its first frames | random: from a frame on that is drawn for it
    samples.references = "target"  # target: frames of the clip itself | views: the set's other views of the subject
    samples.frames = 8  # target: reference frames per clip, drawn over its window without replacement; 0 = all
    samples.crops = 4  # views: reference crops per item, of its views in turn; also of a picture that has none
    samples.jitter = 0.1  # share of each side that the crop of a picture may cut away, target and views (our choice)
    samples.seed = 0  # of the drawn frames and crops

    config.work = work = ConfigDict()
    work.unit = 256  # items per unit of work; a kill loses the units in work, and every unit makes one file per bucket
    work.workers = 0  # threads that decode; 0 = one per core
    work.clips = 1  # clips encoded at once, over all devices of the host
    work.pictures = 16  # pictures and reference images encoded at once
    work.captions = 16  # captions encoded at once

    config.rejected = rejected = ConfigDict()
    rejected.most = 0.1  # share of items that may be unusable before the run stops
    rejected.judged_after = 256  # items after which that share is judged

    config.page = page = ConfigDict()
    page.thumbnails = 120  # samples shown on index.html, evenly over the set
    page.frames = 6  # frames shown of a clip
    page.height = 120  # pixels of a picture there

    return config
