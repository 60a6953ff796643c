"""Builds the bank of cut-outs that scenes are composed from, out of Debian and npm packages.

`python -m trl_recipes.scenes.build_bank` is its command. Stages, each kept on disk so that a killed run goes on:

1. `packages`: download the archives with `apt-get` and `npm`, unpack what is needed;
2. one stage per source (`emoji`, `tuxpaint`, `furniture`, `wallpapers`, `rooms`): cut out, name, colour, encode;
3. `build`: join, check and write the files that `trl_recipes.scenes.SceneBank` reads, and ATTRIBUTION.md.

What a picture shows is written down in `tables/`, by hand: file names and captions alone mislead (a dog house is no
dog). The splits follow from the tables too, so an identity never changes its split when a source is left out.
"""
