"""Images of a session through a network, each at the size that the network was trained with."""

from metric_kd.cli.pack import pack_for
from metric_kd.cli.session import Session
from metric_kd.data.loading import ImageLoader
from metric_kd.data.records import Splits
from metric_kd.data.transforms import Geometry
from metric_kd.evaluation.embed import Embeddings, embed
from metric_kd.models.network import Network


def embeddings_of_test(session: Session, network: Network) -> Embeddings:
    """The embeddings of the session's test images, in the order of the data set."""
    config, loader, size = session.config, session.test, network.spec.input_size
    if size != config.input_size:
        assert size is not None
        geometry = Geometry(input_size=size, flip=False)
        pack = pack_for(config, Splits(loader.records, loader.records), [])
        loader = ImageLoader(loader.records, geometry, seed=0, workers=config.workers, pack=pack)
    try:
        total = -(-len(loader.records) // config.batch)
        return embed(
            network,
            loader.test(config.batch),
            device=session.device,
            precision=config.precision,
            progress="embedding",
            total=total,
        )
    finally:
        if loader is not session.test:
            loader.close()
