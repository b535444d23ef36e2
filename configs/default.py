"""Every field of a run, once, with its unit and where the paper speaks of it; a dataset's config is its difference.

The values are KDSR with the paper's settings (Section 4, "Parameter Settings") where the paper gives them. ``:NAME``,
``:kdsr-NAME`` and ``:tuned-NAME`` behind a config file's name choose another row of Table 2: see
``kdsr_jax.config.apply_variant``.
"""

from ml_collections import ConfigDict

from kdsr_jax.config import apply_variant


def get_config(argument: str | None = None) -> ConfigDict:
    """Return the default configuration, KDSR on the planted shop, or the variant that ``argument`` names."""
    config = ConfigDict()
    config.seed = 0  # of parameters, dropout, batches and pairs; teacher and planted shop have their own

    config.data = data = ConfigDict()
    data.name = "planted"  # dataset: the folder <root>/<name>, or the embedded planted shop
    # auto | folder | planted | movielens | amazon; auto = the folder where there is one, else by name: planted, or the
    # public ml-1m, beauty, clothing, sports and toys, which are downloaded
    data.source = "auto"
    data.root = ""  # folder that holds <name>/ with interactions.* and features/, or these; not in the fingerprint
    data.manual_dir = ""  # folder with the archives of public data; "" = download them; not in the fingerprint
    data.k_core = 5  # interactions that each user and each item must keep; 1 = no filter (Section 4, datasets)
    data.user_fraction = 1.0  # share of the users that are kept, always the same ones; less for quick trials
    data.max_length = 50  # items of the history a model reads
    data.window_stride = 0  # items between windows of a longer history; 0 = max_length / 2; not for prefixes
    data.modalities = ("image-facets", "text-facets")  # <modality>-<encoder> of features/*.npz; () = item ids only
    # auto | device | host; where histories are kept in training: on the device, or on the host, which sends each chunk of steps
    # only its own; auto = the device if they take up to an eighth of its memory; not in the fingerprint
    data.histories = "auto"

    data.columns = columns = ConfigDict()  # what the columns of a folder's files are called; not in the fingerprint
    columns.user_id = "user_id"  # in interactions.*
    columns.item_id = "item_id"  # in interactions.* and items.*
    columns.timestamp = "timestamp"  # in interactions.*, where there is one
    columns.title = "title"  # in items.*, where there is one

    data.planted = planted = ConfigDict()  # settings of the planted shop; read by no other source
    planted.num_users = 1200  # users
    planted.num_items = 600  # items, 18 or more
    planted.mean_length = 12.0  # interactions a user on average, 6 .. num_items / 3
    planted.entanglement = 0.5  # 0 = one block of features a facet .. 1 = a full rotation mixes all facets
    planted.noise = 0.3  # standard deviation of the noise on the features, whose signal has 1
    planted.missing_rate = 0.05  # share of items, none of them cold, that lack a modality, for each modality
    planted.cold_rate = 0.02  # share of items that come on sale late, so that no train part has them
    planted.feature_dim = 64  # width of the features, 8 or more
    planted.seed = 0  # of the shop and its log

    # how kdsr_jax.encode makes features of a folder's items; not in the fingerprint
    config.encode = encode = ConfigDict()
    encode.missing = False  # make features files that are missing before training
    encode.text_fields = ()  # columns of items.* that make an item's text, in this order; () = all, the title first
    encode.field_characters = 400  # first characters that are taken of each
    encode.template = ""  # text with fields in braces instead, such as "{title} by {brand:.50}"; "" = joined by ". "
    encode.layer = -1  # whose output is pooled: 0 = the embeddings .. -1 = the last
    encode.batch_size = 32  # items encoded at a time
    encode.revision = ""  # of a model from the hub; "" = its newest
    encode.models_folder = ""  # folder of models' folders, looked into before the hub
    encode.trust_remote_code = False  # run code that comes with a model from the hub

    config.teacher = teacher = ConfigDict()
    teacher.condensed_dim = 0  # width of the condensed features and modality tables; 0 = model.dim (Section 3.1)
    teacher.autoencoder = "linear"  # linear | pca | sigmoid (Section 3.2: "a linear autoencoder")
    teacher.rotation = "balanced"  # balanced | random | none: what is dealt to which split (not in the paper)
    teacher.score_fn = "cosine"  # cosine | dot | euclidean | manhattan: the correlation function (Section 3.2, Table 4)
    teacher.num_splits = 8  # chunks of a condensed vector, D (Section 3.2; value in Section 4)
    teacher.num_codes = 100  # codewords of a codebook, x (Section 3.2; value in Section 4)
    teacher.quantizer = "vq"  # vq | kmeans | vq_joint (Section 3.2, Table 4)
    teacher.num_pairs = 1_000_000  # item pairs the codebook is fitted on
    teacher.seed = 0  # of autoencoder, rotation, item pairs and codebook

    config.distill = distill = ConfigDict()
    distill.enabled = True  # both distillation losses and their heads (Section 3.2)
    distill.lambda_score = 1.0  # weight of the holistic loss, lambda_1 (Equation 7; value in Section 4)
    distill.lambda_code = 0.5  # weight of the dissected loss, lambda_2 (Equation 7; value in Section 4)
    distill.temperature = 1.5  # tau of the soft match (Equation 3; value in Section 4)
    # sigmoid | softmax (over an item's row of pairs) | identity (Equation 3); the sigmoid of a distance, euclidean or manhattan,
    # is nearly 1 for all pairs, and its softmax is largest for the least alike: take the identity for these
    distill.sigma = "sigmoid"
    distill.pair_budget = 2048  # item pairs a step, of all modalities together, drawn from the batch's; 0 = all of them

    config.model = model = ConfigDict()
    # backbone: gru4rec | sasrec | srgnn | mmsrec | sasrm | nova | difsr | trans2d | mmsr | mmsr_nodes | kdsr_lite (Section 4)
    model.name = "sasrm"
    model.tables = "tuned"  # modality tables: tuned | frozen | none (Figure 3)
    model.dim = 128  # width of item and sequence representations (Section 4)
    model.num_layers = 2  # blocks of the backbone
    model.num_heads = 2  # divides dim; attention heads of sasrec, mmsrec, sasrm, nova, difsr, trans2d
    model.hidden_dropout = 0.5  # rate on embeddings and block outputs (searched in 0 .. 0.9 in Section 4)
    model.attention_dropout = 0.5  # rate on attention weights (likewise); gru4rec and srgnn have none
    # gate | concat | sum: id and modalities to one vector (Equation 1); in difsr, their scores; no choice in mmsrec,
    # trans2d and mmsr_nodes
    model.fusion = "gate"
    model.readout = "last"  # last | last_sum | mean | long_short | attention: states to one vector (Equation 6)
    model.short_term = 3  # last positions of the short-term interest, q, of readout long_short (Equation 6)
    model.item_scores = "ids"  # ids | fused: what the sequence vector is compared with (Section 3.3)
    model.table_scale = 0.2  # root mean square of the modality tables at the start (not in the paper)
    model.num_clusters = 30  # clusters of a modality's features that mmsr and cluster_weight use
    model.cluster_links = 3  # nearest clusters an item is linked to
    model.cluster_weight = 0.0  # of predicting the next item's clusters, as DIF-SR does; 0 = off
    model.official_quirks = True  # mmsr, mmsr_nodes: as MMSR's code runs, not as meant
    model.score_temperature = 0.05  # mmsrec: divisor of the cosine scores
    model.warmup_epochs = 0  # mmsrec: first epochs of contrastive training on items alone

    config.train = train = ConfigDict()
    train.epochs = 100  # passes over the training targets, at most
    train.batch_size = 512  # prediction targets a step (Section 4)
    # items drawn for each step's softmax, which is then biased and noisy, for catalogues whose scores cost too much;
    # 0 = the softmax over all items
    train.sampled_items = 0
    # update the rows of a step's items alone, so that its cost does not grow with the catalogue ("lazy" Adam: the momentum of
    # other rows waits); needs train.sampled_items
    train.sparse_tables = False
    train.prefixes = False  # every target has a pass of its own, as it has in any case in models trained on prefixes
    train.learning_rate = 1e-3  # of Adam, epsilon (Section 3.3; searched in 1e-4 .. 1e-1 in Section 4)
    train.weight_decay = 0.0  # coupled L2 of rows that have a gradient (searched in {0, 1e-5} in Section 4)
    train.clip_norm = 0.0  # largest global norm of the gradient; 0 = no clipping
    train.ramp_epochs = 10  # epochs until the modality tables learn at full rate, eta; 0 = no ramp (Section 3.3)
    train.ramp_start = 0.1  # share of the learning rate the ramp starts from (Section 3.3)
    train.ramp_end = 1.0  # and ends at; the official code has no ramp and keeps 0.25
    train.steps_per_call = 8  # steps of one bucket the device runs in a row; more are fewer calls but worse mixed
    # inputs of matrix products: default (of the device: float32 on CPUs, tf32 on recent GPUs, bf16 on TPUs) | float32 | tf32 |
    # bf16; teachers, sums, parameters and moments are float32 in any case; on CPUs bf16 rounds in the softmax over all items alone
    train.matmul_precision = "default"
    train.patience = 5  # evaluations without a new best before training stops

    config.eval = evaluation = ConfigDict()
    evaluation.protocol = "validation"  # validation | paper | both: who chooses the epoch, see docs/protocols.md
    evaluation.every = 1  # epochs between evaluations
    evaluation.topk = (5, 10, 20)  # cut-offs k of hr@k, mrr@k and ndcg@k, rising (5 and 20 in Table 2)
    evaluation.filter_seen = False  # leave out of the ranking what the history holds (the paper keeps it in)

    config.mesh = mesh = ConfigDict()  # the devices of a run, which do not change its results; not in the fingerprint
    mesh.data = 0  # devices that a batch is spread over; 0 = all that mesh.model leaves
    mesh.model = 0  # devices that item tables and scores are spread over; 0 = 1; data x model is the number of devices
    mesh.distributed = False  # join the processes that Slurm, a TPU pod, MPI or Kubernetes has started
    mesh.coordinator = ""  # HOST:PORT of process 0, to join processes that none of these has started; "" = not so
    mesh.num_processes = 1  # how many there are then
    mesh.process = 0  # which of them this is, from 0

    config.forgetting = forgetting = ConfigDict()  # what tuned tables forget (Figure 1); not part of the fingerprint
    forgetting.num_pairs = 100_000  # item pairs, the same in every run on the same items; 0 = measure nothing
    forgetting.reference_workdir = ""  # finished run of item ids alone to compare with as well; "" = none

    config.log = log = ConfigDict()  # views of metrics.jsonl; not part of the fingerprint
    log.tensorboard = False  # also write event files for TensorBoard (needs the extra tensorboard)
    return apply_variant(config, argument)
