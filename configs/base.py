"""Every key of a training run, with its default: adapting a text-to-video model to a subject, with paper A's settings.

Not meant to be run as it is (`model.path` and `data` are empty); the other files in this folder override what differs.
"Paper A" is arXiv 2504.17816. Where the paper is silent the comment says "our choice".
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()

    config.model = model = ConfigDict()
    model.path = ""  # folder of the base model (converted or diffusers); empty = random weights of the sizes below
    model.dtype = "float32"  # dtype of frozen base weights: float32 | bfloat16; trained ones are float32
    model.family = "cogvideox"  # without model.path: cogvideox | wan
    model.transformer = ConfigDict(convert_dict=False)  # without model.path: the keys of transformer/config.json
    model.text_encoder = ConfigDict(convert_dict=False)  # without model.path: the keys of text_encoder/config.json
    model.vae = ConfigDict(convert_dict=False)  # without model.path: the keys of vae/config.json that are not defaults
    model.scheduler = ConfigDict(convert_dict=False)  # without model.path: the keys of scheduler_config.json
    model.defaults = ConfigDict(convert_dict=False)  # without model.path: the keys of defaults.json
    model.index = ConfigDict(convert_dict=False)  # without model.path: settings in model_index.json (expand_timesteps)

    config.data = data = ConfigDict()
    data.identity = ""  # prepared subject-image pairs: a folder, several "a=2,b=1", a raw set's .py, or "small_world"
    data.motion = ""  # prepared captioned clips, the same

    data.workers = 0  # processes that read rows; 0 = a thread

    config.small_world = small_world = ConfigDict()  # what the name "small_world" in `data` stands for
    small_world.pairs = 4096  # subject-image pairs, each of another subject
    small_world.clips = 2048  # clips, each of another subject
    small_world.seed = 0  # of both pools
    small_world.marked_clips = True  # put <cls> before the subject in the captions of clips too

    config.train = train = ConfigDict()
    train.objective = "subject"  # subject (identity and motion, one of them per step) | text_to_video
    train.mode = "lora"  # lora (adapter only) | full (all weights of the transformer)
    train.steps = 4000  # optimiser steps of the whole run (paper A)
    train.seed = 0  # of the run key: every stochastic choice of a step is a function of (seed, step)
    train.dtype = "float32"  # dtype of the activations: float32 | bfloat16 (paper A: bfloat16); losses are float32
    train.accumulate = 1  # parts that a batch is computed in, one after the other: less memory, their mean gradient
    train.remat = "all"  # recomputed backwards: all | attention (all but its outputs) | offload (those in host memory)
    train.heartbeat = 60.0  # seconds of silence after which another process of the job counts as dead
    train.peak_tflops = 0.0  # peak TFLOP/s of a device, for MFU; 0 = the published one where it is known
    train.ema_decay = 0.0  # moving average of the trained weights, used for samples and the result; 0 = none
    train.save_every = 500  # steps between checkpoints
    train.keep = 2  # checkpoints kept
    train.keep_every = 0  # steps between checkpoints that are kept for good; 0 = none
    train.export = ()  # styles of the adapter's files for other tools at the end: any of diffusers, comfyui, peft
    train.log_every = 10  # steps between TensorBoard points and progress-bar values (metrics.jsonl has every step)
    train.sample_every = 0  # steps between sample sheets; 0 = none

    config.sample = sample = ConfigDict()
    sample.guidance = 0.0  # strength of the prompt on sample sheets; 0 = the model's own default

    config.switch = switch = ConfigDict()
    switch.motion_probability = 0.2  # probability that a step trains motion instead of identity (paper A: p)
    switch.order = "mixed"  # mixed (drawn anew for each step) | stages (1 - p of the steps identity, then motion)

    config.identity = identity = ConfigDict()
    identity.batch_size = 32  # pairs per identity step (paper A: 256 in the text, 32 in the supplement)
    identity.view_drop = 0.5  # probability of an identity step without its reference (paper A; all of it: our choice)
    identity.references = 1  # views given at once, drawn without replacement; the paper's is 1

    config.motion = motion = ConfigDict()
    motion.batch_size = 32  # clips per motion step (paper A)
    motion.token_drop = 0.5  # fraction of reference tokens removed in a motion step (paper A; fixed count: our choice)
    motion.references = 1  # frames of the clip given at once, drawn without replacement; the paper's is 1; 0 = none
    motion.frame = "random"  # which frame is the reference: random (paper A) | first

    config.text_to_video = text_to_video = ConfigDict()
    text_to_video.batch_size = 64  # clips per text_to_video step
    text_to_video.image_batch_size = 0  # still images (targets of data.identity) added to each text_to_video step
    text_to_video.image_weight = 0.2  # share of the still images in the loss
    text_to_video.first_frame = 0.0  # share of the clips given their first frame (image-to-video models)

    config.text = text = ConfigDict()
    text.dropout = 0.1  # probability of the empty prompt in place of a caption (not in paper A: our choice)
    text.train_encoder = False  # train the text encoder with the transformer (mode full, data with token ids)

    config.noise = noise = ConfigDict()
    noise.timesteps = "uniform"  # law of the timestep: uniform (CogVideoX; Wan, before its shift) | logit_normal
    noise.logit_mean = 0.0  # mean of the logit of t / T under logit_normal
    noise.logit_std = 1.0  # standard deviation of the logit of t / T under logit_normal
    noise.shift = 0.0  # flow models: shift of drawn timesteps towards noise; 0 = the scheduler's own (our choice)

    config.lora = lora = ConfigDict()
    lora.rank = 128  # paper A
    lora.alpha = 64.0  # paper A; the update is scaled by alpha / rank
    lora.dropout = 0.2  # paper A: on the input of the adapter, in training only
    lora.targets = ()  # PEFT suffixes; empty = the family's LORA_TARGETS (CogVideoX: paper A's list)
    lora.adaln = "all"  # streams that the adaLN adapter acts on: all (the released runs) | reference (as they meant)

    config.reference = reference = ConfigDict()  # where reference tokens stand (paper A: Wan needs another way)
    reference.placement = ""  # before (the clip, as one more frame) | after; empty = CogVideoX before, Wan after
    reference.offset = 1  # after: time slots from the clip's last frame to the first reference (our choice)
    reference.shift = 1.0  # Wan: grid widths that references stand aside (our choice)

    config.optimizer = optimizer = ConfigDict()
    optimizer.name = "adamw"  # adamw (paper A) | muon (block matrices by Muon, the rest by Adam)
    optimizer.learning_rate = 5e-5  # peak (paper A)
    optimizer.beta1 = 0.9  # paper A
    optimizer.beta2 = 0.95  # paper A
    optimizer.epsilon = 1e-8  # of Adam
    optimizer.weight_decay = 1e-4  # decoupled, on matrices only (not in paper A: our choice)
    optimizer.clip = 1.0  # global gradient norm (paper A)
    optimizer.warmup = 200  # steps of linear warm-up (paper A)
    optimizer.schedule = "cosine"  # cosine (with restarts, paper A) | constant, after the warm-up
    optimizer.cycles = 1  # cosine cycles over the run (number of restarts not in paper A: our choice)
    optimizer.decay_steps = 0  # step at which the last cycle ends; 0 = train.steps

    config.validation = validation = ConfigDict()  # on rows kept out of training, always with the same noise
    validation.every = 0  # steps between validations (loss per task and bin of noise levels); 0 = none
    validation.rows = 0  # rows of each dataset that are kept out of training
    validation.bins = 5  # bins of noise levels; the loss is taken at their middles

    config.gradients = gradients = ConfigDict()  # of identity against motion, on the rows kept out of training
    gradients.every = 0  # steps between comparisons (paper A: 5 to 50, 100 as a monitor); 0 = none

    config.mesh = mesh = ConfigDict()  # all devices of all hosts; batches are cut over all of them
    mesh.fsdp = 1  # devices that weights are spread over; 0 = all of them

    config.log = log = ConfigDict()
    log.wandb_project = ""  # Weights & Biases project to log to, beside TensorBoard; empty = none

    return config
