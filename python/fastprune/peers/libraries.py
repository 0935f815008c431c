"""Other libraries as peers: SciPy, MKL, onnxruntime and OpenVINO; imported when needed."""

from __future__ import annotations

import glob
import importlib
import os
import re
import sys
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fastprune.peers.candidates import Call, Case, Peer
from fastprune.peers.layers import Linear


class ScipyCsr(Peer):
    """SciPy's CSR product, which runs on one thread."""

    name = "SciPy CSR"
    kinds = ("linear",)
    packages: ClassVar[dict[str, str]] = {"scipy": "scipy"}

    def prepare(self, case: Case) -> Call:
        csr = importlib.import_module("scipy.sparse").csr_matrix(case.pruned.numpy())
        columns = case.x.t().contiguous().numpy()
        return lambda: csr @ columns

    def result(self, raw: Any, case: Case) -> Tensor:
        return torch.from_numpy(raw).t()


class MklCsr(ScipyCsr):
    """MKL's CSR product through sparse_dot_mkl, into an output that is there already."""

    name = "MKL CSR"
    packages: ClassVar[dict[str, str]] = {
        "scipy": "scipy",
        "sparse_dot_mkl": "sparse_dot_mkl",
    }

    def available(self) -> str | None:
        # The package does not look for the MKL that pip puts beside it.
        near = sorted(glob.glob(os.path.join(sys.prefix, "lib", "libmkl_rt.so*")))
        if near:
            os.environ.setdefault("MKL_RT", near[-1])
        return super().available()

    def versions(self) -> dict[str, str]:
        mkl = importlib.import_module("sparse_dot_mkl").mkl_get_version_string()
        found = re.search(r"\d+(\.\d+)+", mkl)
        return super().versions() | {"MKL": found.group() if found else mkl}

    def prepare(self, case: Case) -> Call:
        package = importlib.import_module("sparse_dot_mkl")
        package.mkl_set_num_threads(torch.get_num_threads())
        csr = importlib.import_module("scipy.sparse").csr_matrix(case.pruned.numpy())
        columns = case.x.t().contiguous().numpy()
        out = case.x.new_empty(case.layer.rows, case.layer.batch).numpy()
        return lambda: package.dot_product_mkl(csr, columns, out=out, out_scalar=0.0)


class OnnxRuntime(Peer):
    """onnxruntime's dense product: one Gemm or Conv node, input and output bound to memory."""

    name = "onnxruntime"
    packages: ClassVar[dict[str, str]] = {"onnxruntime": "onnxruntime", "onnx": "onnx"}

    # An operator set and file version that every onnxruntime of recent years reads.
    _OPSET, _IR = 17, 8

    def prepare(self, case: Case) -> Call:
        runtime = importlib.import_module("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        # Its threads spin after a run and would take the cores of the next candidate.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        out = np.empty(_output_shape(case), np.float32)
        session = runtime.InferenceSession(
            self._model(case, out.shape), options, providers=["CPUExecutionProvider"]
        )
        x, binding = case.x.numpy(), session.io_binding()
        binding.bind_input("x", "cpu", 0, np.float32, x.shape, x.ctypes.data)
        binding.bind_output("y", "cpu", 0, np.float32, out.shape, out.ctypes.data)

        def run() -> np.ndarray[Any, Any]:
            session.run_with_iobinding(binding)
            return out

        # The binding knows addresses only: the arrays live as long as this function.
        run.operands = (x, out)  # type: ignore[attr-defined]
        return run

    def _model(self, case: Case, out_shape: tuple[int, ...]) -> bytes:
        helper = importlib.import_module("onnx.helper")
        constant = importlib.import_module("onnx.numpy_helper").from_array
        layer, single = case.layer, importlib.import_module("onnx").TensorProto.FLOAT
        if isinstance(layer, Linear):
            node = helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)
        else:
            node = helper.make_node(
                "Conv",
                ["x", "w"],
                ["y"],
                kernel_shape=[layer.kernel] * 2,
                pads=[layer.padding] * 4,
                strides=[layer.stride] * 2,
            )
        graph = helper.make_graph(
            [node],
            "layer",
            [helper.make_tensor_value_info("x", single, list(case.x.shape))],
            [helper.make_tensor_value_info("y", single, list(out_shape))],
            [constant(case.pruned.numpy(), "w")],
        )
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", self._OPSET)], ir_version=self._IR
        )
        return model.SerializeToString()  # type: ignore[no-any-return]


class OpenVino(Peer):
    """OpenVINO's dense product in float32, input and output bound to memory."""

    name = "OpenVINO"
    packages: ClassVar[dict[str, str]] = {"openvino": "openvino"}

    def prepare(self, case: Case) -> Call:
        openvino = importlib.import_module("openvino")
        ops = importlib.import_module("openvino.opset13")
        layer, x = case.layer, case.x.numpy()
        source = ops.parameter(list(x.shape), np.float32)
        weight = ops.constant(case.pruned.numpy())
        if isinstance(layer, Linear):
            node = ops.matmul(source, weight, False, True)
        else:
            pads = [layer.padding] * 2
            node = ops.convolution(source, weight, [layer.stride] * 2, pads, pads, [1, 1])
        compiled = openvino.Core().compile_model(
            openvino.Model([node], [source]),
            "CPU",
            {
                "INFERENCE_NUM_THREADS": torch.get_num_threads(),
                "NUM_STREAMS": 1,
                # It would choose bfloat16 where the processor has it.
                "INFERENCE_PRECISION_HINT": "f32",
                # Pinned threads would stay pinned for the other candidates.
                "ENABLE_CPU_PINNING": False,
            },
        )
        out = np.empty(_output_shape(case), np.float32)
        request = compiled.create_infer_request()
        request.set_input_tensor(openvino.Tensor(x, shared_memory=True))
        request.set_output_tensor(openvino.Tensor(out, shared_memory=True))

        def run() -> np.ndarray[Any, Any]:
            request.infer(share_outputs=True)
            return out

        run.operands = (x, out)  # type: ignore[attr-defined]
        return run


def _output_shape(case: Case) -> tuple[int, ...]:
    layer = case.layer
    if isinstance(layer, Linear):
        return layer.batch, layer.rows
    return layer.batch, layer.rows, layer.out_size, layer.out_size
