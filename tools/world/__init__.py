"""The generator of the offline world: real facts, invented people and companies, in the formats of CRE and MQuAKE.

The package ships what it makes with seed 0 and reads nothing of it. To make those files anew, from the root of the repository::

    python -m pip install --requirement tools/world/requirements.txt
    python -m tools.world.ship

Other versions of the two packages in ``requirements.txt`` give other facts. Where the files have changed,
``propmeta_edit.recipes.worlds.WORLD_VERSION`` has to be raised, as models are taught these facts and results are measured on them.
"""
