"""The explorer of tokens: a page on which a picture goes through a small ViT, DynamicViT and LookupViT.

`look.py` is what the page asks, and the only thing that runs the models. `server.py` answers a browser on
this machine with it (`tinytoken explore`). `static.py` writes the same page with this package beside it, and
then Pyodide runs look.py inside the browser. `models.py` reads and writes the three models, which
lessons/tools/explorer_models.py trained. The page is `page.html`, with its script and its styles.
"""
