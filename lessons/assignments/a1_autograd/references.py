"""Functions of this assignment by other means, for the tests of the exercises that use them: a slip in one
costs nothing in another."""
import graphlib

import numpy as np


def order(end):
    nodes, todo = {}, [end]
    while todo:
        node = todo.pop()
        if id(node) not in nodes:
            nodes[id(node)] = node
            todo += node.parents
    graph = {key: [id(parent) for parent in node.parents] for key, node in nodes.items()}
    return [nodes[key] for key in graphlib.TopologicalSorter(graph).static_order()]


def unbroadcast(g, shape):
    places = np.broadcast_to(np.arange(int(np.prod(shape))).reshape(shape), g.shape)
    return np.bincount(places.ravel(), weights=g.ravel(), minlength=int(np.prod(shape))).reshape(shape)
