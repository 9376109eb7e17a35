"""Certificates of the cluster, made by openssl."""

import subprocess

CA_DAYS, LEAF_DAYS = 30, 7


class Authority:
    """A certificate authority in a folder."""

    def __init__(self, folder, name):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.cert, self.key = folder / f"{name}.crt", folder / f"{name}.key"
        openssl("req", "-x509", *NEW_KEY, "-keyout", self.key, "-out", self.cert, "-subj", f"/CN={name}",
                "-days", CA_DAYS, "-addext", "keyUsage=critical,keyCertSign,cRLSign")

    def issue(self, name, common_name, organization="", names=()):
        """Issues a certificate for server and client, or replaces it at once. Returns its path and that of its key."""
        cert, key = self.folder / f"{name}.crt", self.folder / f"{name}.key"
        new = {path: path.with_suffix(path.suffix + ".new") for path in (cert, key)}
        request, extensions = self.folder / f"{name}.csr", self.folder / f"{name}.ext"
        subject = f"/O={organization}/CN={common_name}" if organization else f"/CN={common_name}"
        openssl("req", *NEW_KEY, "-keyout", new[key], "-out", request, "-subj", subject)
        lines = ["basicConstraints=CA:FALSE", "keyUsage=critical,digitalSignature",
                 "extendedKeyUsage=serverAuth,clientAuth"]
        if names:
            lines.append("subjectAltName=" + ",".join(names))
        extensions.write_text("\n".join(lines) + "\n")
        openssl("x509", "-req", "-in", request, "-CA", self.cert, "-CAkey", self.key, "-out", new[cert],
                "-days", LEAF_DAYS, "-extfile", extensions)
        # The key first: a reader between the two sees a pair that does not match, and reads again.
        new[key].replace(key)
        new[cert].replace(cert)
        return cert, key


NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")


def openssl(*arguments):
    """Runs openssl. Returns its output."""
    return subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True, text=True).stdout


def key_pair(folder, name):
    """Makes the key that signs service-account tokens. Returns the paths of the private and the public one."""
    private, public = folder / f"{name}.key", folder / f"{name}.pub"
    openssl("genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048", "-out", private)
    openssl("pkey", "-in", private, "-pubout", "-out", public)
    return private, public


def kubeconfig(path, server, ca, cert, key):
    """Writes a kubeconfig with a client certificate."""
    path.write_text(f"""\
apiVersion: v1
kind: Config
clusters: [{{ name: lab, cluster: {{ server: "{server}", certificate-authority: {ca} }} }}]
users: [{{ name: user, user: {{ client-certificate: {cert}, client-key: {key} }} }}]
contexts: [{{ name: lab, context: {{ cluster: lab, user: user }} }}]
current-context: lab
""")
    path.chmod(0o600)
    return path
