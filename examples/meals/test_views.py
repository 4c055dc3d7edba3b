"""Tests of the project's features: `millrace test --definition examples.meals`."""

from examples.meals.views import courier, habits
from schemas.testing import expect, features

ORDER = {"order_id": 1, "customer": "ann", "courier": "bo", "placed_at": "2024-03-02T12:00+00:00", "price": 30.0}


def delivered(number: int, at: str, minutes: float, tip: float = 0) -> dict[str, object]:
    return {"order_id": number, "customer": "ann", "courier": "bo", "delivered_at": at, "minutes": minutes, "tip": tip}


def test_only_deliveries_before_the_order_count() -> None:
    found = features(
        courier,
        [ORDER],
        deliveries=[
            delivered(2, "2024-03-02T11:00+00:00", 30),
            delivered(3, "2024-03-01T11:00+00:00", 50),
            delivered(4, "2024-03-02T12:00+00:00", 99),
        ],
    )
    expect(
        found,
        [
            {
                "deliveries_by_courier_minutes_mean_1d": 30,
                "deliveries_by_courier_minutes_max_7d": 50,
                "slow_by_courier_count_7d": 1,
                "last_minutes": 30,
            }
        ],
    )


def test_a_first_order_has_no_usual_price() -> None:
    expect(features(habits, [ORDER]), [{"against_usual": None, "orders_by_customer_count_14d": 0, "hour": 12}])


def test_a_delivery_that_is_reported_twice_counts_once() -> None:
    twice = [delivered(2, "2024-03-01", 30, tip=2), delivered(2, "2024-03-02", 30, tip=9)]
    found = features(habits, [ORDER], deliveries=twice)
    expect(found, [{"deliveries_by_customer_tip_count_14d": 1, "deliveries_by_customer_tip_max_14d": 2}])
