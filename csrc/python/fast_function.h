// Functions of the C API, because pybind11's conversions cost as much as the rest of a small call.
#pragma once

#include <pybind11/pybind11.h>

#include <new>
#include <stdexcept>

namespace camkd::python {

inline PyMethodDef fast(const char* name, PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
    return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, nullptr};
}

// Whether `count` arguments were given; sets a TypeError if not.
inline bool takes(const char* name, int expected, Py_ssize_t count) {
    if (count != expected) PyErr_Format(PyExc_TypeError, "%s takes %d arguments, got %zd", name, expected, count);
    return count == expected;
}

// The new reference that `body` returns; null, with C++ exceptions as Python's, if it throws.
template <class Body>
PyObject* guarded(Body body) {
    try {
        return body();
    } catch (pybind11::error_already_set& error) {
        error.restore();
    } catch (const std::bad_alloc&) {
        PyErr_NoMemory();
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
}

}  // namespace camkd::python
