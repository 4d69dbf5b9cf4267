# SPDX-License-Identifier: Apache-2.0
"""Figures for people: the report of one model, the sweep over shapes and budgets."""
