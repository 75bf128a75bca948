# SPDX-License-Identifier: Apache-2.0
"""Training one model across sites: settings, placement, exchange, ledger, checkpoint, report.

Start with :mod:`fomoe.federation.launch` (a run) and :mod:`fomoe.federation.site` (one site). The
package imports nothing by itself.
"""
