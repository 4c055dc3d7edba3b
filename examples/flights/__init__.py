"""Departures from New York in 2013: will a flight leave more than 15 minutes late?"""
