"""A FasterViT as an ONNX graph: what JAX traces of the model, translated operation by operation.

All that does not depend on the images (position biases, batch norms' gains) is computed here, and what scales and
shifts a convolution's or linear layer's channels goes into its weights. All operators are standard ones, of opset 20.

The graph is built as nodes that refer to their inputs; what the output does not need is never written. Shapes hold
whole numbers, and texts for what depends on the number of images, such as 'b' or '4*b'.
"""

import collections
import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnx

from fastervit_jax.model.attention import LayerNorm
from fastervit_jax.model.fastervit import FasterViT

OPSET = 20
"""The first with Gelu."""
EXTERNAL_FROM = 1_900_000_000
"""Bytes of weights that get a file of their own: a protocol buffer has less than 2 GiB."""

Shape = tuple[int | str, ...]


@dataclasses.dataclass(eq=False)
class Node:
    """One operation, with nodes and constants as inputs. Op "Input" is the images, "Linear" is x @ w (+ bias)."""

    op: str
    inputs: tuple[Any, ...]
    shape: Shape
    attributes: dict[str, Any] = dataclasses.field(default_factory=dict)


Value = Node | np.ndarray


# From a model to nodes


@jax.jit
def onnx_layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: jax.Array) -> jax.Array:
    """Layer norm over the last axis as one call, whose name the translation knows."""
    x = x - x.mean(-1, keepdims=True)
    axes = (1,) * (x.ndim - 1) + (-1,)
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + epsilon) * scale.reshape(axes) + bias.reshape(axes)


def _one_call(call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
    module = context.module
    if isinstance(module, LayerNorm) and context.method_name == "__call__":
        own = module.variables["params"]
        return onnx_layer_norm(args[0], own["scale"], own["bias"], jnp.float32(module.epsilon))
    return call(*args, **kwargs)


def build(model: FasterViT, variables: Mapping[str, Any], height: int, width: int) -> Node:
    """The node of the model's logits, in eval mode, for images (b, height, width, channels) of any number b.

    Raises NotImplementedError for an operation that has no translation here.
    """
    (batch,) = jax.export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((batch, height, width, model.config.in_chans), jnp.float32)
    with nn.intercept_methods(_one_call), jax.default_matmul_precision("highest"):
        traced = jax.jit(model.apply).trace(variables, images).jaxpr
        values = [*map(np.asarray, jax.tree.leaves(variables)), Node("Input", (), _shape(images))]
        (output,) = _walk(traced.jaxpr, traced.consts, values)
    return simplify(output)


def _shape(aval: Any) -> Shape:
    return tuple(n if isinstance(n, int | np.integer) else str(n) for n in aval.shape)


def _walk(jaxpr: Any, consts: list[Any], values: list[Value]) -> list[Value]:
    """What a traced program gives for these inputs: arrays where nothing depends on the images, nodes elsewhere."""
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *values], strict=True))

    def value(atom: Any) -> Value:
        return np.asarray(atom.val) if hasattr(atom, "val") else known[atom]

    for eqn in jaxpr.eqns:
        inputs = [value(atom) for atom in eqn.invars]
        name = eqn.primitive.name
        inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        symbolic = any(isinstance(n, str) for atom in eqn.outvars for n in _shape(atom.aval))
        if name in ("jit", "pjit") and eqn.params["name"] == onnx_layer_norm.__name__:
            x, scale, bias, epsilon = inputs
            attributes = {"axis": -1, "epsilon": float(epsilon)}
            outputs = [Node("LayerNormalization", (x, scale, bias), x.shape, attributes)]
        elif inner is not None:
            outputs = _walk(inner.jaxpr, inner.consts, inputs)
        elif not symbolic and not any(isinstance(x, Node) for x in inputs):
            outputs = eqn.primitive.bind(*inputs, **eqn.params)
            outputs = [np.asarray(x) for x in (outputs if eqn.primitive.multiple_results else [outputs])]
        elif name in TRANSLATIONS:
            if name not in BROADCASTING:
                for x, atom in zip(inputs, eqn.invars, strict=True):
                    if x.shape != _shape(atom.aval):
                        raise NotImplementedError(f"{name} of {_shape(atom.aval)}, of which there is {x.shape}")
            outputs = TRANSLATIONS[name](eqn, *inputs)
            outputs = outputs if isinstance(outputs, list) else [outputs]
        else:
            raise NotImplementedError(f"the operation {name} of JAX {jax.__version__} has no ONNX translation here")
        known |= dict(zip(eqn.outvars, outputs, strict=True))
    return [value(atom) for atom in jaxpr.outvars]


# Operations on nodes


def elementwise(op: str, *inputs: Value) -> Node:
    """An operation that broadcasts."""
    rank = max(len(x.shape) for x in inputs)
    shapes = [(1,) * (rank - len(x.shape)) + tuple(x.shape) for x in inputs]
    return Node(op, inputs, tuple(next((n for n in sides if n != 1), 1) for sides in zip(*shapes, strict=True)))


def transpose(x: Node, order: tuple[int, ...]) -> Node:
    if x.op == "Transpose":
        order, x = tuple(x.attributes["perm"][i] for i in order), x.inputs[0]
    if order == tuple(range(len(order))):
        return x
    return Node("Transpose", (x,), tuple(x.shape[i] for i in order), {"perm": order})


def reshape(x: Node, shape: Shape) -> Node:
    if x.op == "Reshape":
        x = x.inputs[0]
    if x.shape == shape:
        return x
    sides = [-1 if isinstance(n, str) else n for n in shape]
    if sides.count(-1) > 1:
        raise NotImplementedError(f"reshape of {x.shape} to {shape}: two sides that depend on the number of images")
    return Node("Reshape", (x, np.array(sides, np.int64)), shape)


def slice_axes(x: Node, bounds: Mapping[int, tuple[int, int]]) -> Node:
    """x[..., start:stop, ...] on the given axes."""
    if not bounds:
        return x
    axes, (starts, stops) = list(bounds), zip(*bounds.values(), strict=True)
    shape = tuple(bounds[i][1] - bounds[i][0] if i in bounds else n for i, n in enumerate(x.shape))
    return Node("Slice", (x, *(np.array(part, np.int64) for part in (starts, stops, axes))), shape)


def index(x: Node, axis: int, which: int) -> Node:
    """x[..., which, ...]: that axis goes."""
    if x.op == "Transpose":
        order = x.attributes["perm"]
        rest = [n - (n > order[axis]) for i, n in enumerate(order) if i != axis]
        return transpose(index(x.inputs[0], order[axis], which), tuple(rest))
    return Node("Gather", (x, np.array(which, np.int64)), x.shape[:axis] + x.shape[axis + 1 :], {"axis": axis})


def multiply(a: Value, b: Value) -> Node:
    """a · b; GELU if the factors are x / 2 and erfc(-x / sqrt(2))."""
    if not isinstance(a, Node):
        a, b = b, a
    if isinstance(b, Node) and a.op == "Mul" and b.op == "Erfc" and b.inputs[0].op == "Mul":
        (x, half), (minus, root) = a.inputs, b.inputs[0].inputs
        constants = not isinstance(half, Node) and not isinstance(root, Node) and half.size == root.size == 1
        if constants and half == 0.5 and np.isclose(root, 0.5**0.5) and minus.op == "Neg" and minus.inputs[0] is x:
            return elementwise("Gelu", x)
    return elementwise("Mul", a, b)


def divide(a: Value, b: Value) -> Node:
    """a / b; softmax if they are exp(x) and its sum over the last axis, where x may have had a maximum taken away."""
    if not isinstance(b, Node):
        return multiply(a, np.asarray(1 / b, np.float32))
    total = b.inputs[0] if b.op == "Reshape" else b
    sums = isinstance(a, Node) and a.op == "Exp" and total.op == "ReduceSum" and total.inputs[0] is a
    if sums and total.attributes["axes"] == (len(a.shape) - 1,) and b.shape == (*a.shape[:-1], 1):
        (x,) = a.inputs
        if x.op == "Sub" and x.inputs[0].shape == x.shape and x.inputs[1].shape[-1] == 1:
            x = x.inputs[0]
        return Node("Softmax", (x,), a.shape, {"axis": -1})
    return elementwise("Div", a, b)


# Simplification


POINTWISE = ("Add", "Sub", "Mul", "Div", "Max", "Relu", "Gelu", "Neg", "Exp", "Erfc", "Sigmoid")


def simplify(output: Node) -> Node:
    """The same function, with what scales and shifts channels in the weights, and transpositions cancelled.

    Convolutions have channels first, the model has them last: an operation on single values lets them pass.
    """
    order = nodes(output)
    uses = collections.Counter(x for node in order for x in node.inputs if isinstance(x, Node))
    new: dict[Node, Node] = {}
    new_uses: collections.Counter[Node] = collections.Counter()
    for node in order:
        inputs = [new[x] if isinstance(x, Node) else x for x in node.inputs]
        if node.op == "Transpose":
            new[node] = transpose(inputs[0], node.attributes["perm"])
        elif node.op == "Reshape":
            new[node] = reshape(inputs[0], node.shape)
        elif node.op in POINTWISE:
            new[node] = _into_layer(node.op, inputs, new_uses) or _channels_first(node.op, inputs)
        else:
            new[node] = dataclasses.replace(node, inputs=tuple(inputs))
        new_uses[new[node]] = max(new_uses[new[node]], uses[node])
    return new[output]


def _channels_first(op: str, inputs: list[Value]) -> Node:
    """An operation on single values. A transposition that all nodes have alike goes behind it."""
    (order, *others) = {x.attributes["perm"] if x.op == "Transpose" else None for x in inputs if isinstance(x, Node)}
    if order is None or others:
        return elementwise(op, *inputs)
    back = tuple(np.argsort(order).tolist())
    inputs = [x.inputs[0] if isinstance(x, Node) else x.transpose(back) if x.ndim else x for x in inputs]
    return transpose(elementwise(op, *inputs), order)


def _into_layer(op: str, inputs: list[Value], uses: Mapping[Node, int]) -> Node | None:
    """A product, sum or difference with a constant for each channel, within the layer before it; None if there is none.

    Channels are the last axis. The layer's output must have no other use.
    """
    if op not in ("Mul", "Add", "Sub"):
        return None
    x, factor = inputs if isinstance(inputs[0], Node) or op == "Sub" else inputs[::-1]
    if isinstance(factor, Node) or not isinstance(x, Node) or x.shape[-1] not in factor.shape[-1:]:
        return None
    if factor.size != factor.shape[-1] or uses[x] > 1:
        return None
    if x.op == "Reshape" and x.shape[-1] == x.inputs[0].shape[-1]:
        inner = _into_layer(op, [x.inputs[0], factor.reshape(-1)], uses)
        return inner and reshape(inner, x.shape)
    layer = x.inputs[0] if x.op == "Transpose" and x.attributes["perm"] == (0, 2, 3, 1) else x
    if layer.op != ("Linear" if layer is x else "Conv") or uses[layer] > 1:
        return None
    images, kernel, *bias = layer.inputs
    factor = factor.reshape(-1)
    if op == "Mul":
        kernel = kernel * (factor[:, None, None, None] if layer.op == "Conv" else factor[None])
        bias = [b * factor for b in bias]
    else:
        bias = [(bias[0] if bias else 0) + (factor if op == "Add" else -factor)]
    layer = dataclasses.replace(layer, inputs=(images, kernel, *bias))
    return layer if x.op == "Linear" else transpose(layer, x.attributes["perm"])


# Operations of JAX


def _broadcast(eqn: Any, x: Value) -> Value:
    """With axes of length 1 where there is only one value: those that follow broadcast."""
    shape: list[int | str] = [1] * len(eqn.params["shape"])
    for side, axis in zip(x.shape, eqn.params["broadcast_dimensions"], strict=True):
        shape[axis] = side
    return reshape(x, tuple(shape)) if isinstance(x, Node) else np.asarray(x).reshape(shape)


def _convolution(eqn: Any, x: Node, kernel: np.ndarray) -> Node:
    p, numbers = eqn.params, eqn.params["dimension_numbers"]
    if p["batch_group_count"] != 1 or set(p["lhs_dilation"]) != {1}:
        raise NotImplementedError(f"a convolution with {p}")
    (top, bottom), (left, right) = p["padding"]
    attributes = {"strides": p["window_strides"], "pads": (top, left, bottom, right), "group": p["feature_group_count"],
                  "dilations": p["rhs_dilation"], "kernel_shape": tuple(kernel.shape[i] for i in numbers.rhs_spec[2:])}
    shape = _shape(eqn.outvars[0].aval)
    channels_first = tuple(shape[i] for i in numbers.out_spec)
    kernel = np.asarray(kernel).transpose(numbers.rhs_spec)
    layer = Node("Conv", (transpose(x, numbers.lhs_spec), kernel), channels_first, attributes)
    return transpose(layer, tuple(np.argsort(numbers.out_spec).tolist()))


def _dot(eqn: Any, a: Value, b: Value) -> Node:
    (contract_a, contract_b), (batch_a, batch_b) = eqn.params["dimension_numbers"]
    shape = _shape(eqn.outvars[0].aval)
    linear = isinstance(a, Node) and not isinstance(b, Node) and not batch_a and b.ndim == 2
    if linear and tuple(contract_a) == (len(a.shape) - 1,):
        return Node("Linear", (a, b if contract_b[0] == 0 else b.T), shape)
    free_a, free_b = ([i for i in range(len(x.shape)) if i not in (*batch, *contract)]
                      for x, batch, contract in ((a, batch_a, contract_a), (b, batch_b, contract_b)))
    if not (isinstance(a, Node) and isinstance(b, Node)) or {*map(len, (free_a, free_b, contract_a))} != {1}:
        raise NotImplementedError(f"a product of {a.shape} and {b.shape} with {eqn.params['dimension_numbers']}")
    a, b = transpose(a, (*batch_a, *free_a, *contract_a)), transpose(b, (*batch_b, *contract_b, *free_b))
    return Node("MatMul", (a, b), shape)


def _slice(eqn: Any, x: Node) -> Node:
    p = eqn.params
    if set(p["strides"] or (1,)) != {1}:
        raise NotImplementedError(f"slices with strides {p['strides']}")
    parts = zip(p["start_indices"], p["limit_indices"], x.shape, strict=True)
    return slice_axes(x, {i: (start, stop) for i, (start, stop, n) in enumerate(parts)
                          if not isinstance(n, str) and (start, stop) != (0, n)})


def _squeeze(eqn: Any, x: Node) -> Node:
    (axis, *others) = eqn.params["dimensions"]
    if x.op == "Slice" and not others and x.inputs[3].tolist() == [axis]:
        return index(x.inputs[0], axis, int(x.inputs[1][0]))
    return _reshape(eqn, x)


def _reshape(eqn: Any, x: Node) -> Node:
    return reshape(x, _shape(eqn.outvars[0].aval))


def _gather(eqn: Any, x: Node, indices: np.ndarray) -> Node:
    """x[..., start:stop, ...], or x[..., indices, ...] on one axis, with indices that are known."""
    p = eqn.params
    numbers, shape = p["dimension_numbers"], _shape(eqn.outvars[0].aval)
    sizes = [n if isinstance(n, int | np.integer) else str(n) for n in p["slice_sizes"]]
    axes, gone = numbers.start_index_map, numbers.collapsed_slice_dims
    if not isinstance(indices, Node) and not gone and indices.ndim == 1 and len(shape) == len(x.shape):
        return slice_axes(x, {axis: (int(start), int(start) + sizes[axis])
                              for axis, start in zip(axes, indices, strict=True)})
    plain = not isinstance(indices, Node) and len(axes) == 1 and tuple(gone) == tuple(axes)
    if plain and all(sizes[i] == n for i, n in enumerate(x.shape) if i != axes[0]):
        between = range(axes[0], axes[0] + indices.ndim - 1)
        if tuple(i for i in range(len(shape)) if i not in between) == tuple(numbers.offset_dims):
            return Node("Gather", (x, indices[..., 0].astype(np.int64)), shape, {"axis": axes[0]})
    raise NotImplementedError(f"a gather from {x.shape} with {numbers}")


def _pad(eqn: Any, x: Node, fill: np.ndarray) -> Node:
    low, high, interior = zip(*eqn.params["padding_config"], strict=True)
    if any(interior) or min(*low, *high) < 0:
        raise NotImplementedError(f"padding {eqn.params['padding_config']}")
    if not any((*low, *high)):
        return x
    return Node("Pad", (x, np.array([*low, *high], np.int64), fill), _shape(eqn.outvars[0].aval))


def _window_sum(eqn: Any, x: Node) -> Node:
    p, (n, kh, kw, c) = eqn.params, eqn.params["window_dimensions"]
    dilated = {*p["base_dilation"], *p["window_dilation"]} != {1} or np.any(p["padding"])
    if (n, c) != (1, 1) or dilated:
        raise NotImplementedError(f"sums of windows with {p}")
    out = _shape(eqn.outvars[0].aval)
    channels_first = tuple(out[i] for i in (0, 3, 1, 2))
    attributes = {"kernel_shape": (kh, kw), "strides": p["window_strides"][1:3]}
    mean = Node("AveragePool", (transpose(x, (0, 3, 1, 2)),), channels_first, attributes)
    return transpose(elementwise("Mul", mean, np.array(kh * kw, np.float32)), (0, 2, 3, 1))


def _reduce(op: str) -> Callable:
    return lambda eqn, x: Node(op, (x,), _shape(eqn.outvars[0].aval), {"axes": tuple(eqn.params["axes"])})


def _concatenate(eqn: Any, *parts: Value) -> Node:
    return Node("Concat", parts, _shape(eqn.outvars[0].aval), {"axis": eqn.params["dimension"]})


def _max(eqn: Any, a: Value, b: Value) -> Value:
    x, limit = (a, b) if isinstance(a, Node) else (b, a)
    if not isinstance(limit, Node) and limit.size == 1:
        if np.all(limit == 0):
            return elementwise("Relu", x)
        if np.all(limit == -np.inf):
            return x
    return elementwise("Max", a, b)


def _convert(eqn: Any, x: Value) -> Value:
    if eqn.params["new_dtype"] != np.float32:
        raise NotImplementedError(f"a conversion to {eqn.params['new_dtype']}: the model has to be float32")
    return x


def _unary(op: str) -> Callable:
    return lambda eqn, x: elementwise(op, x)


def _binary(op: str) -> Callable:
    return lambda eqn, a, b: elementwise(op, a, b)


BROADCASTING = {
    "add": _binary("Add"), "sub": _binary("Sub"), "mul": lambda eqn, a, b: multiply(a, b),
    "div": lambda eqn, a, b: divide(a, b), "max": _max,
    "neg": _unary("Neg"), "exp": _unary("Exp"), "erfc": _unary("Erfc"),
    "logistic": _unary("Sigmoid"), "square": lambda eqn, x: multiply(x, x),
    "convert_element_type": _convert, "copy": lambda eqn, x: x, "stop_gradient": lambda eqn, x: x,
    "broadcast_in_dim": _broadcast,
}  # fmt: skip
"""Operations that take a value with axes of length 1 for the whole one."""
TRANSLATIONS = {
    **BROADCASTING, "conv_general_dilated": _convolution, "dot_general": _dot, "slice": _slice, "squeeze": _squeeze,
    "reshape": _reshape, "gather": _gather, "pad": _pad, "reduce_window_sum": _window_sum,
    "unstack": lambda eqn, x: [index(x, eqn.params["axis"], i) for i in range(len(eqn.outvars))],
    "reduce_sum": _reduce("ReduceSum"), "reduce_max": _reduce("ReduceMax"), "concatenate": _concatenate,
    "transpose": lambda eqn, x: transpose(x, tuple(eqn.params["permutation"])),
}  # fmt: skip


# From nodes to a file


def write(output: Node, path: pathlib.Path, output_name: str) -> None:
    """Write the graph that ends in `output` to `path`, and weights of more than EXTERNAL_FROM bytes to PATH.data."""
    order = nodes(output)
    writer = _Writer(path, sum(x.nbytes for node in order for x in node.inputs if isinstance(x, np.ndarray)))
    writer.names[output] = output_name
    for node in order:
        writer.add(node)
    (images,) = (node for node in order if node.op == "Input")
    graph = onnx.helper.make_graph(
        writer.nodes, "FasterViT",
        [onnx.helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, ["batch", *images.shape[1:]])],
        [onnx.helper.make_tensor_value_info(output_name, onnx.TensorProto.FLOAT, ["batch", *output.shape[1:]])],
        writer.weights)
    opset = [onnx.helper.make_opsetid("", OPSET)]
    model = onnx.helper.make_model(graph, opset_imports=opset, producer_name="fastervit_jax",
                                   ir_version=onnx.helper.find_min_ir_version_for(opset))
    writer.close()
    onnx.save_model(model, path)
    onnx.checker.check_model(path, full_check=True)


def nodes(output: Node) -> list[Node]:
    """All nodes that `output` needs, each after its inputs."""
    order: dict[Node, None] = {}
    stack = [(output, False)]
    while stack:
        node, done = stack.pop()
        if done:
            order[node] = None
        elif node not in order:
            stack.append((node, True))
            stack += [(x, False) for x in node.inputs if isinstance(x, Node)]
    return list(order)


class _Writer:
    """Turns nodes into ONNX's, and constants into weights, in the file itself or in one beside it."""

    def __init__(self, path: pathlib.Path, weight_bytes: int):
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.names: dict[Node, str] = {}
        self._constants: dict[tuple, str] = {}
        external = weight_bytes > EXTERNAL_FROM
        self._data = path.with_name(f"{path.name}.data").open("wb") if external else None

    def close(self) -> None:
        if self._data:
            self._data.close()

    def add(self, node: Node) -> None:
        name = self.names.setdefault(node, f"{node.op.lower()}_{len(self.names)}")
        if node.op == "Input":
            self.names[node] = "images"
            return
        inputs = [self.names[x] if isinstance(x, Node) else self._constant(x) for x in node.inputs]
        if node.op == "Linear":
            product = name if len(inputs) == 2 else f"{name}_product"
            self._emit("MatMul", inputs[:2], product)
            if len(inputs) == 3:
                self._emit("Add", [product, inputs[2]], name)
        elif node.op == "Erfc":
            self._emit("Erf", inputs, f"{name}_erf")
            self._emit("Sub", [self._constant(np.array(1, np.float32)), f"{name}_erf"], name)
        elif node.op in ("ReduceSum", "ReduceMax"):
            axes = self._constant(np.array(node.attributes["axes"], np.int64))
            self._emit(node.op, [*inputs, axes], name, keepdims=0)
        else:
            self._emit(node.op, inputs, name, **node.attributes)

    def _emit(self, op: str, inputs: list[str], output: str, **attributes: Any) -> None:
        self.nodes.append(onnx.helper.make_node(op, inputs, [output], name=output, **attributes))

    def _constant(self, x: np.ndarray) -> str:
        small = x.size <= 64
        key = (x.dtype.str, x.shape, x.tobytes() if small else id(x))  # the graph keeps x
        if key not in self._constants:
            name = self._constants[key] = f"constant_{len(self._constants)}"
            dtype = onnx.helper.np_dtype_to_tensor_dtype(x.dtype)
            tensor = onnx.TensorProto(name=name, dims=x.shape, data_type=dtype)
            if small or not self._data:
                tensor.raw_data = x.tobytes()
            else:
                self._data.write(b"\0" * (-self._data.tell() % 4096))  # pages, so that a runtime can map them
                place = {"location": pathlib.Path(self._data.name).name, "offset": self._data.tell(),
                         "length": x.nbytes}
                self._data.write(np.asarray(x, order="C").data)
                tensor.data_location = onnx.TensorProto.EXTERNAL
                for key_, entry in place.items():
                    tensor.external_data.add(key=key_, value=str(entry))
            self.weights.append(tensor)
        return self._constants[key]
