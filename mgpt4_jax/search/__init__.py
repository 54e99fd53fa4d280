"""Search of pictures by words or by a picture, in an index that stays on disk and grows.

``files.py`` finds and reads pictures, ``vectors.py`` is the room of the vector library, ``table.py`` the one file that
says what an index holds, ``index.py`` puts them together, and ``page.py`` shows what was found.
"""

from __future__ import annotations

from mgpt4_jax.search.index import Added, Hit, SearchIndex

__all__ = ["Added", "Hit", "SearchIndex"]
