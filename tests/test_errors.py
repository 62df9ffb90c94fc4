from __future__ import annotations

import inspect
import pickle

import pytest

import torch_elastic_mem as tem
from torch_elastic_mem import errors

TREE = {
    tem.TemError: (Exception,),
    tem.InvalidArgument: (tem.TemError, ValueError),
    tem.BlockError: (tem.InvalidArgument,),
    tem.AdmissionError: (tem.InvalidArgument,),
    tem.OutOfMemory: (tem.TemError, MemoryError),
    tem.DriverError: (tem.TemError, RuntimeError),
    tem.DriverMissing: (tem.DriverError,),
    tem.ClosedError: (tem.TemError, RuntimeError),
    tem.InUseError: (tem.TemError, RuntimeError),
    tem.ForkedError: (tem.TemError, RuntimeError),
    tem.NotResident: (tem.TemError, RuntimeError),
    tem.BrokerError: (tem.TemError, ConnectionError),
}


def test_the_tree_is_whole_and_exported() -> None:
    defined = {value for value in vars(errors).values() if inspect.isclass(value)}
    assert defined == TREE.keys()
    assert {kind.__name__ for kind in defined} <= set(tem.__all__)


@pytest.mark.parametrize("kind", TREE, ids=lambda kind: kind.__name__)
def test_an_error_is_also_the_built_in_that_callers_expect(kind: type[tem.TemError]) -> None:
    assert kind.__bases__ == TREE[kind]
    error = kind("what was asked")
    assert isinstance(error, tem.TemError)
    assert str(error) == "what was asked"
    assert inspect.getdoc(kind)


def test_a_driver_error_carries_the_driver_s_number_between_processes() -> None:
    error = pickle.loads(pickle.dumps(tem.DriverError("cuMemMap failed", code=801)))
    assert (type(error), str(error), error.code) == (tem.DriverError, "cuMemMap failed", 801)
    assert tem.DriverMissing("no driver").code == 0
