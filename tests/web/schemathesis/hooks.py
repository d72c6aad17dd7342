"""What Schemathesis has to know beyond the description."""

import schemathesis

# The default of a product's own maximum, which bounds a quantity.
MOST_UNITS = 10


@schemathesis.hook
def before_call(context, case, kwargs):
    for name, value in list((case.headers or {}).items()):
        # An id taken over from an answer into X-Request-Id stays a number, which is no header.
        if not isinstance(value, str):
            case.headers[name] = str(value)
    # JSON Schema takes 1.0 for an integer; here one is written without a fraction.
    case.body = exact(case.body)
    if isinstance(case.body, dict) and "userId" in case.body:
        quantity = case.body.get("quantity")
        if type(quantity) is int and MOST_UNITS < quantity <= 1_000_000:
            case.body["quantity"] = quantity % MOST_UNITS + 1


def exact(value):
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {name: exact(member) for name, member in value.items()}
    if isinstance(value, list):
        return [exact(member) for member in value]
    return value
