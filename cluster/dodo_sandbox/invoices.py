"""Invoices as PDF files of one page with plain text lines."""

from collections.abc import Sequence

from fastapi import APIRouter, Response

from cluster.dodo_sandbox.payments import PaymentRecord, payment_of
from cluster.dodo_sandbox.state import SandboxDep

router = APIRouter()

_TOP = 790
_LEADING = 18


@router.get("/invoices/payments/{payment_id}")
async def retrieve_invoice(payment_id: str, sandbox: SandboxDep) -> Response:
    return Response(pdf(invoice_lines(payment_of(sandbox, payment_id))), media_type="application/pdf")


def invoice_lines(payment: PaymentRecord) -> list[str]:
    def amount(cents: int) -> str:
        return f"{payment.currency} {cents // 100}.{cents % 100:02d}"

    return [
        "Invoice (sandbox: no real money)",
        f"Invoice {payment.invoice_id or '-'}  Payment {payment.payment_id}",
        f"{payment.created_at:%Y-%m-%d %H:%M} UTC  {payment.status}",
        f"{payment.customer.name} <{payment.customer.email}>",
        "",
        *(f"{one.name}: {amount(one.amount)}" for one in payment.lines),
        f"Tax: {amount(payment.tax or 0)}",
        f"Total: {amount(payment.total_amount)}",
    ]


def pdf(lines: Sequence[str]) -> bytes:
    """A valid one-page PDF 1.4 file; characters outside Latin-1 become question marks."""
    text = "".join(f"({_escaped(line)}) Tj T*\n" for line in lines)
    stream = f"BT /F1 11 Tf {_LEADING} TL 50 {_TOP} Td\n{text}ET".encode("latin-1", "replace")
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 595 842] /Contents 5 0 R"
        b" /Resources << /Font << /F1 4 0 R >> >> >>",
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream),
    ]
    out, offsets = bytearray(b"%PDF-1.4\n"), []
    for number, content in enumerate(objects, 1):
        offsets.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    table = len(out)
    out += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    out += b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    out += b"trailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, table)
    return bytes(out)


def _escaped(line: str) -> str:
    return line.replace("\\", r"\\").replace("(", r"\(").replace(")", r"\)")
