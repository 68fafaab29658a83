"""What the files of every data set are known by: they are looked at before anything in them is opened.

Readers of these files unpickle them, which runs whatever a file says, and a silently changed file changes every figure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType

import numpy as np

# SHA-256; digests of 40 digits are Git's own (SHA-1 of "blob LENGTH\0" and the content), of files that their repository
# lists but does not fit into every copy of it. Cora_ML, CiteSeer and Photo are known in their repositories' form
# (abojchevski/graph2gauss, shchur/gnn-benchmark), and as the same arrays packed anew; Planetoid's are those of
# kimiyoung/planetoid.
_LINES = """
ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db  images/MNIST/raw/train-images-idx3-ubyte
65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5  images/MNIST/raw/train-labels-idx1-ubyte
0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7  images/MNIST/raw/t10k-images-idx3-ubyte
ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2  images/MNIST/raw/t10k-labels-idx1-ubyte
c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888  images/FashionMNIST/raw/train-images-idx3-ubyte
bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9  images/FashionMNIST/raw/train-labels-idx1-ubyte
5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b  images/FashionMNIST/raw/t10k-images-idx3-ubyte
0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34  images/FashionMNIST/raw/t10k-labels-idx1-ubyte
54636561a3ce25bd3e19253c6b0d8538147b0ae398331ac4a2d86c6d987368cd  images/cifar-10-batches-py/data_batch_1
766b2cef9fbc745cf056b3152224f7cf77163b330ea9a15f9392beb8b89bc5a8  images/cifar-10-batches-py/data_batch_2
0f00d98ebfb30b3ec0ad19f9756dc2630b89003e10525f5e148445e82aa6a1f9  images/cifar-10-batches-py/data_batch_3
3f7bb240661948b8f4d53e36ec720d8306f5668bd0071dcb4e6c947f78e9682b  images/cifar-10-batches-py/data_batch_4
d91802434d8376bbaeeadf58a737e3a1b12ac839077e931237e0dcd43adcb154  images/cifar-10-batches-py/data_batch_5
f53d8d457504f7cff4ea9e021afcf0e0ad8e24a91f3fc42091b8adef61157831  images/cifar-10-batches-py/test_batch
f962466ef690d46b226450fb9aadc74ba4bc64a76aa526b5827fe4bc5c7125cb  images/cifar-10-batches-py/batches.meta
735e79b04f092ca3d2e6d07f368c0a7d70d48c48d28865950cc24454cf45129b  images/cifar-100-python/train
4b67687d9933c4db8f0831104447f15b93774f4f464bd0516f0f0f2ac83b7864  images/cifar-100-python/test
a5d4786345c961390f865e93b434dbd5c6904ce880667e0cb888c97d449f28b9  images/cifar-100-python/meta
2df67d57d5c34554a689f8addde7fc3bdf37a415  graphs/CitationFull/cora_ml/raw/cora_ml.npz
ffbe4e64857dc6bf38f1877e4312559a064df84b59d0f32f938717de5d5af0fd  graphs/CitationFull/cora_ml/raw/cora_ml.npz
b611f48626e7f40fcc81a36b4f022979ea998b38  graphs/CitationFull/citeseer/raw/citeseer.npz
c1afa2e0955062952f421eb2240f33e3dfded39891cfbdd6856fd633d7a44b5b  graphs/CitationFull/citeseer/raw/citeseer.npz
0735ab74ee845ee26da2db763294d42646058534  graphs/CitationFull/pubmed/raw/pubmed.npz
97323743cb56aca9dd611f5b4b46862c1c9c6bd9  graphs/Amazon/Photo/raw/amazon_electronics_photo.npz
bbd79ecd5203127c0e89e63c5de768a543a72d446165d213d3b044aea05af60b  graphs/Amazon/Photo/raw/amazon_electronics_photo.npz
23cfa55d91c6f624233f5eb7b6e3f141f1bd2b2ae39608a63cf5d084bb27baab  graphs/Planetoid/Cora/raw/ind.cora.x
b9afbaa4a400df991f6f02ef677e1e44da55ffc04801fd02f9e673987829226a  graphs/Planetoid/Cora/raw/ind.cora.tx
9419ba2f26f5c35243db64aba110e0f35a04851609e0dc5433450676ca6b8543  graphs/Planetoid/Cora/raw/ind.cora.allx
94465c14eb53e04ca262198dcbb2521ee8af60fb3f3d546cd6ca24a511b0e7d1  graphs/Planetoid/Cora/raw/ind.cora.y
41f5ac76596a1699cc33f53084a2419e92961c42bb75f36fc38e616d348532ad  graphs/Planetoid/Cora/raw/ind.cora.ty
2b998f5cc7fedc86e7f97ca2498f47a1ffc1462c29e2d578b23bf3f62b6e7d71  graphs/Planetoid/Cora/raw/ind.cora.ally
58f13302f39dde8852dad6fe6d15b89b077b6d7f837626bce671ef80344b383d  graphs/Planetoid/Cora/raw/ind.cora.graph
297ce89af2b51a6a194181c7dbe1796c6a1cf9cd9349a88383b1b1e227867875  graphs/Planetoid/Cora/raw/ind.cora.test.index
d20de19150741e555de0ed037195630fc194114ebc7fd72ced62810148aa22f6  graphs/Planetoid/CiteSeer/raw/ind.citeseer.x
539a8906a2da97628d212f2fdd668c109a8b3f0d36574b59e5d3fd5b5303da21  graphs/Planetoid/CiteSeer/raw/ind.citeseer.tx
2ac30345d95c9ec933a817ee0bdd6a5f077f8c184a20e696910192d534414668  graphs/Planetoid/CiteSeer/raw/ind.citeseer.allx
8ba87e515d8e3ee3cf52f6d2c5b86aa73f11ecad825a808455209ec26cd54924  graphs/Planetoid/CiteSeer/raw/ind.citeseer.y
55e5bd1ba1e733a04598753ad1a8d57957f4b8f89e74519f41f4f4938767e4ce  graphs/Planetoid/CiteSeer/raw/ind.citeseer.ty
f704b2d986dde6c2669934de1f3ae5696a6cf9455c0f6b2646a2d135ea0a1c95  graphs/Planetoid/CiteSeer/raw/ind.citeseer.ally
d79a4ef9d3e7169aee8946145f6b7306e35bc79bffad26346cfb94e10e9912a7  graphs/Planetoid/CiteSeer/raw/ind.citeseer.graph
2af990671580b6b2df5d158d1038f8292e30c9cd821b5453f399659b25b723d4  graphs/Planetoid/CiteSeer/raw/ind.citeseer.test.index
fbe9cb5c47200d1b7769a26e579be3b7130b556831f9d850e77c4c74f2599b33  graphs/Planetoid/PubMed/raw/ind.pubmed.x
4eb5f5d0f30f26497eb0ac6ac9719d09c67e284f1ed0385c93f3ef27a671da3d  graphs/Planetoid/PubMed/raw/ind.pubmed.tx
3b86bccf08111c37c632a9dd8ab63db25ea76361  graphs/Planetoid/PubMed/raw/ind.pubmed.allx
e6c807633307a07ed659249006536a147c7999c797f11a2560752990181b41b3  graphs/Planetoid/PubMed/raw/ind.pubmed.y
ee2e0d4819d9fbcc403689c3bf2e49face401b605932f093bc58ab6461130fdd  graphs/Planetoid/PubMed/raw/ind.pubmed.ty
0c37bbe3b5014ec365e9d393cf4791925e5ed94fb194305d74f064a8d7b50f0e  graphs/Planetoid/PubMed/raw/ind.pubmed.ally
5b89f0036ca22909471f1e6558eb42fa06e0c730a577bde5b058b40638f81dc9  graphs/Planetoid/PubMed/raw/ind.pubmed.graph
b101d421688bbaecbd82e8a18f1e282378d6830f3a37666f28ebc47f844341b5  graphs/Planetoid/PubMed/raw/ind.pubmed.test.index
"""


def _table(lines: str) -> dict[str, tuple[str, ...]]:
    table: dict[str, tuple[str, ...]] = {}
    for digest, place in map(str.split, lines.split("\n")[1:-1]):
        table[place] = (*table.get(place, ()), digest)
    return table


DIGESTS: Mapping[str, tuple[str, ...]] = MappingProxyType(_table(_LINES))
"""Digests that a file may have, by its place below ``data_dir``. GitHub's graph has none: nobody hands it out any more."""


def check_file(path: Path, place: str) -> None:
    """Refuse a file that is not the one known by this place, or that nobody knows and that could run code.

    Args:
        path: of the file.
        place: its place below ``data_dir``.

    Raises:
        ValueError: it is another file: what was expected, and what is there.
        OSError: it cannot be read.
    """
    wanted = DIGESTS.get(place, ())
    if not wanted:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                for name in arrays.files:
                    try:
                        arrays[name]
                    except ValueError as error:  # an array of objects is a pickle
                        raise ValueError(f"{path.name} holds pickled objects, which could run code") from error
        return
    status = path.stat()
    found = _digests(str(path.resolve()), status.st_size, status.st_mtime_ns)
    if not set(found) & set(wanted):
        expected = " or ".join(f"{'SHA-256' if len(w) == 64 else 'Git SHA-1'} {w[:12]}..." for w in wanted)
        raise ValueError(f"{path.name} is another file: expected {expected}, found SHA-256 {found[0][:12]}...")


@cache
def _digests(path: str, size: int, modified: int) -> tuple[str, str]:
    """SHA-256 and Git's digest of a file, once per process as long as its size and time stay."""
    sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            sha256.update(part)
            git.update(part)
    return sha256.hexdigest(), git.hexdigest()
