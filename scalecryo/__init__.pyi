from scalecryo.api.run import Map as Map
from scalecryo.api.run import Run as Run
from scalecryo.api.run import Table as Table
from scalecryo.api.run import open_run as open_run
from scalecryo.api.store import Particles as Particles
from scalecryo.api.store import Store as Store
from scalecryo.api.store import open_store as open_store
from scalecryo.api.verbs import convert as convert
from scalecryo.api.verbs import reconstruct as reconstruct
from scalecryo.api.verbs import simulate as simulate

__version__: str
