use std::{io, path::Path};

use rcgen::{
    BasicConstraints, CertificateParams, CustomExtension, DnType, ExtendedKeyUsagePurpose,
    GeneralSubtree, IsCa, Issuer, KeyPair, KeyUsagePurpose, NameConstraints, date_time_ymd,
};
use rustls::{
    CipherSuite, ClientConfig, ClientConnection, NamedGroup, ProtocolVersion, ServerConfig,
    ServerConnection, SupportedProtocolVersion,
    sign::SingleCertAndKey,
    version::{TLS12, TLS13},
};

use super::*;
use crate::{
    TransportFault,
    tls::{self, Authorities, Identity, ServerCredentials, Tls12},
};

/// A certificate and its key, which may sign others.
struct Signed {
    der: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

/// A CA's certificate with this common name, valid for `localhost`, after `change`.
fn authority(name: &str, change: impl FnOnce(&mut CertificateParams)) -> CertificateParams {
    let mut params = CertificateParams::new(["localhost".to_owned()]).unwrap();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    change(&mut params);
    params
}

fn self_signed(params: CertificateParams) -> Signed {
    let key = KeyPair::generate().unwrap();
    let der = params.self_signed(&key).unwrap().der().clone();
    Signed { der, issuer: Issuer::new(params, key) }
}

impl Signed {
    fn sign(&self, params: CertificateParams) -> Self {
        let key = KeyPair::generate().unwrap();
        let der = params.signed_by(&key, &self.issuer).unwrap().der().clone();
        Self { der, issuer: Issuer::new(params, key) }
    }

    fn identity(&self) -> Identity {
        let key = self.issuer.key().serialize_der().try_into().unwrap();
        Identity { chain: vec![self.der.clone()], key }
    }
}

fn roots(authority: &Signed) -> Arc<RootCertStore> {
    tls::authorities(std::slice::from_ref(&authority.der)).unwrap()
}

/// What the rules say of a chain that a server, and that a client, presents.
fn verified(
    root: &Signed,
    leaf: &Signed,
    intermediates: &[&Signed],
    rules: CertificateRules,
) -> [Result<(), Error>; 2] {
    let chain: Vec<_> = intermediates.iter().map(|signed| signed.der.clone()).collect();
    let (now, name) = (UnixTime::now(), ServerName::try_from("localhost").unwrap());
    let servers = of_servers(roots(root), rules).unwrap();
    let clients = of_clients(roots(root), rules).unwrap();
    [
        servers.verify_server_cert(&leaf.der, &chain, &name, &[], now).map(drop),
        clients.verify_client_cert(&leaf.der, &chain, now).map(drop),
    ]
}

#[track_caller]
fn assert_accepted(root: &Signed, leaf: &Signed, intermediates: &[&Signed]) {
    assert_eq!(verified(root, leaf, intermediates, CertificateRules::Go), [Ok(()), Ok(())]);
    for strict in verified(root, leaf, intermediates, CertificateRules::Strict) {
        strict.unwrap_err();
    }
}

#[track_caller]
fn assert_refused(root: &Signed, leaf: &Signed, intermediates: &[&Signed]) {
    for rules in [CertificateRules::Go, CertificateRules::Strict] {
        for result in verified(root, leaf, intermediates, rules) {
            result.unwrap_err();
        }
    }
}

#[test]
fn a_certificate_of_a_ca_is_accepted_by_go_s_rules_alone() {
    let own = self_signed(authority("own", |_| {}));
    assert_accepted(&own, &own, &[]);
    let root = self_signed(authority("root", |_| {}));
    assert_accepted(&root, &root.sign(authority("leaf", |_| {})), &[]);
    assert_refused(&root, &own, &[]);
}

#[test]
fn a_certificate_for_any_extended_key_usage_is_accepted_by_go_s_rules_alone() {
    let root = self_signed(authority("root", |_| {}));
    let with = |usage: ExtendedKeyUsagePurpose, is_ca: IsCa| {
        root.sign(authority("leaf", |params| {
            params.extended_key_usages = vec![usage];
            params.is_ca = is_ca;
        }))
    };
    assert_accepted(&root, &with(ExtendedKeyUsagePurpose::Any, IsCa::ExplicitNoCa), &[]);
    for is_ca in [IsCa::ExplicitNoCa, IsCa::Ca(BasicConstraints::Unconstrained)] {
        let other = with(ExtendedKeyUsagePurpose::CodeSigning, is_ca);
        assert_refused(&root, &other, &[]);
        let of_servers = with(ExtendedKeyUsagePurpose::ServerAuth, is_ca);
        let [server, client] = verified(&root, &of_servers, &[], CertificateRules::Go);
        assert_eq!(server, Ok(()));
        client.unwrap_err();
    }
}

#[test]
fn names_of_servers_are_compared_by_go_s_rules_too() {
    let root = self_signed(authority("root", |_| {}));
    let leaf = root.sign(authority("leaf", |_| {}));
    let servers = of_servers(roots(&root), CertificateRules::Go).unwrap();
    let verify = |name: &str| {
        let name = ServerName::try_from(name.to_owned()).unwrap();
        servers.verify_server_cert(&leaf.der, &[], &name, &[], UnixTime::now())
    };
    verify("localhost").unwrap();
    for name in ["leaf", "other.example", "127.0.0.1"] {
        let error = verify(name).unwrap_err();
        let is_name = matches!(
            error,
            Error::InvalidCertificate(CertificateError::NotValidForNameContext { .. })
        );
        assert!(is_name, "{name}: {error}");
    }
}

#[test]
fn a_chain_is_accepted_only_if_each_part_of_it_may_sign_the_next() {
    let root = self_signed(authority("root", |_| {}));
    let intermediate = |change: &dyn Fn(&mut CertificateParams)| {
        let signed = root.sign(authority("intermediate", |params| change(params)));
        let leaf = signed.sign(authority("leaf", |_| {}));
        (signed, leaf)
    };
    let (good, leaf) = intermediate(&|params| {
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::Any];
    });
    assert_accepted(&root, &leaf, &[&good]);
    assert_refused(&root, &leaf, &[]);

    let refused: [&dyn Fn(&mut CertificateParams); 7] = [
        &|params| params.is_ca = IsCa::ExplicitNoCa,
        &|params| params.is_ca = IsCa::NoCa,
        &|params| params.key_usages = vec![KeyUsagePurpose::CrlSign],
        &|params| params.extended_key_usages = vec![ExtendedKeyUsagePurpose::CodeSigning],
        &|params| params.not_after = date_time_ymd(2020, 1, 1),
        &|params| {
            let permitted_subtrees = vec![GeneralSubtree::DnsName("other.example".into())];
            let constraints = NameConstraints { permitted_subtrees, excluded_subtrees: vec![] };
            params.name_constraints = Some(constraints);
        },
        &|params| params.custom_extensions = vec![unknown_critical()],
    ];
    for change in refused {
        let (signed, leaf) = intermediate(change);
        assert_refused(&root, &leaf, &[&signed]);
    }

    // Of two authorities below one that allows none below it.
    let (first, _) =
        intermediate(&|params| params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0)));
    let second = first.sign(authority("second", |_| {}));
    let leaf = second.sign(authority("leaf", |_| {}));
    assert_refused(&root, &leaf, &[&second, &first]);
}

fn unknown_critical() -> CustomExtension {
    let mut extension = CustomExtension::from_oid_content(&[1, 3, 6, 1, 4, 1, 99999], vec![5, 0]);
    extension.set_criticality(true);
    extension
}

#[test]
fn a_certificate_of_a_ca_must_be_valid_known_and_signed() {
    let root = self_signed(authority("root", |_| {}));
    let refused: [&dyn Fn(&mut CertificateParams); 4] = [
        &|params| params.not_after = date_time_ymd(2020, 1, 1),
        &|params| params.not_before = date_time_ymd(2090, 1, 1),
        &|params| params.custom_extensions = vec![unknown_critical()],
        &|params| {
            let permitted_subtrees = vec![GeneralSubtree::DnsName("localhost".into())];
            let constraints = NameConstraints { permitted_subtrees, excluded_subtrees: vec![] };
            params.name_constraints = Some(constraints);
        },
    ];
    for change in refused {
        assert_refused(&root, &root.sign(authority("leaf", |params| change(params))), &[]);
    }
    // Another key with the root's name.
    let impostor = self_signed(authority("root", |_| {}));
    assert_refused(&root, &impostor.sign(authority("leaf", |_| {})), &[]);
    assert_refused(&root, &impostor, &[]);
    // The bits of the signature are of another certificate.
    let leaf = root.sign(authority("leaf", |_| {}));
    let mut der = leaf.der.to_vec();
    let last = der.len() - 1;
    der[last] ^= 1;
    assert_refused(&root, &Signed { der: der.into(), ..leaf }, &[]);
}

#[test]
fn a_certificate_has_each_extension_once_and_in_its_form() {
    let root = self_signed(authority("root", |_| {}));
    let (alternative_name, key_usage, own) =
        ([2, 5, 29, 17], [2, 5, 29, 15], [1, 3, 6, 1, 4, 1, 9]);
    let signed = |oid: &[u64], contents: &[&[u8]]| {
        root.sign(authority("leaf", |params| {
            params.subject_alt_names.clear();
            for content in contents {
                params
                    .custom_extensions
                    .push(CustomExtension::from_oid_content(oid, content.to_vec()));
            }
        }))
    };
    // A name, bits, and anything.
    for (oid, content) in [
        (&alternative_name[..], &b"\x30\x0b\x82\x09localhost"[..]),
        (&key_usage, b"\x03\x02\x02\x04"),
        (&own, b"\x05\x00"),
    ] {
        let [_, client] = verified(&root, &signed(oid, &[content]), &[], CertificateRules::Go);
        assert_eq!(client, Ok(()), "{oid:?}");
        assert_refused(&root, &signed(oid, &[content, content]), &[]);
    }
    assert_refused(&root, &signed(&alternative_name, &[b"\x05\x00"]), &[]);
    assert_refused(&root, &signed(&key_usage, &[b"\x05\x00"]), &[]);
}

#[test]
fn a_root_with_name_constraints_is_webpki_s_alone() {
    let root = self_signed(authority("root", |params| {
        let permitted_subtrees = vec![GeneralSubtree::DnsName("localhost".into())];
        let constraints = NameConstraints { permitted_subtrees, excluded_subtrees: vec![] };
        params.name_constraints = Some(constraints);
    }));
    assert_refused(&root, &root.sign(authority("leaf", |_| {})), &[]);
    let end_entity = root.sign(authority("leaf", |params| params.is_ca = IsCa::ExplicitNoCa));
    assert_eq!(verified(&root, &end_entity, &[], CertificateRules::Go), [Ok(()), Ok(())]);
}

/// What `openssl x509 -req` makes without a file of extensions.
fn version_1() -> (Arc<RootCertStore>, Identity) {
    let pem = |path: &'static str, pem: &'static [u8]| (Path::new(path), pem);
    let authority = include_bytes!("version1/ca.crt");
    let identity = Identity::from_pem(
        pem("leaf.crt", include_bytes!("version1/leaf.crt")),
        pem("leaf.key", include_bytes!("version1/leaf.key")),
    );
    let found = Authorities::from_pem(Path::new("ca.crt"), authority).unwrap();
    (found.roots.into(), identity.unwrap())
}

#[test]
fn a_certificate_of_version_1_is_accepted_of_clients_and_has_no_name_of_a_server() {
    let (roots, identity) = version_1();
    let leaf = &identity.chain[0];
    let name = ServerName::try_from("node-1").unwrap();
    for (rules, accepted) in [(CertificateRules::Go, true), (CertificateRules::Strict, false)] {
        let clients = of_clients(roots.clone(), rules).unwrap();
        let now = UnixTime::now();
        assert_eq!(clients.verify_client_cert(leaf, &[], now).is_ok(), accepted, "{rules:?}");
        let servers = of_servers(roots.clone(), rules).unwrap();
        servers.verify_server_cert(leaf, &[], &name, &[], now).unwrap_err();
    }
}

#[test]
fn a_certificate_that_is_faulty_in_itself_is_refused_with_its_fault() {
    let (version_1_roots, version_1) = version_1();
    let root = self_signed(authority("root", |_| {}));
    let mut params = CertificateParams::new(vec!["node-1".to_owned()]).unwrap();
    (params.not_before, params.not_after) = (date_time_ymd(2027, 1, 1), date_time_ymd(2026, 1, 1));
    let never_valid = root.sign(params).identity();
    let name = ServerName::try_from("node-1").unwrap();
    for (roots, identity, expected) in [
        (version_1_roots, version_1, "is of X.509 version 1 or 2, and version 3 is needed"),
        (roots(&root), never_valid, "is never valid: its notAfter is before its notBefore"),
    ] {
        let servers = of_servers(roots, CertificateRules::Go).unwrap();
        let verified =
            servers.verify_server_cert(&identity.chain[0], &[], &name, &[], UnixTime::now());
        let fault = TransportFault::from(io::Error::other(verified.unwrap_err()));
        assert!(fault.to_string().contains(expected), "{fault}");
        assert!(fault.needs_another_certificate());
    }
    let strangers =
        of_servers(roots(&self_signed(authority("other", |_| {}))), CertificateRules::Go);
    let leaf = root.sign(CertificateParams::new(vec!["node-1".to_owned()]).unwrap()).identity();
    let refused =
        strangers.unwrap().verify_server_cert(&leaf.chain[0], &[], &name, &[], UnixTime::now());
    let fault = TransportFault::from(io::Error::other(refused.unwrap_err()));
    assert!(!fault.needs_another_certificate(), "{fault}");
}

/// The client's side of a handshake that succeeded.
fn shake_hands(
    connecting: ClientConfig,
    accepting: ServerConfig,
) -> Result<ClientConnection, Error> {
    let name = ServerName::try_from("localhost").unwrap();
    let mut client = ClientConnection::new(Arc::new(connecting), name).unwrap();
    let mut server = ServerConnection::new(Arc::new(accepting)).unwrap();
    while client.is_handshaking() || server.is_handshaking() {
        let mut sent = Vec::new();
        client.write_tls(&mut sent).unwrap();
        server.read_tls(&mut &sent[..]).unwrap();
        server.process_new_packets()?;
        let mut sent = Vec::new();
        server.write_tls(&mut sent).unwrap();
        client.read_tls(&mut &sent[..]).unwrap();
        client.process_new_packets()?;
    }
    Ok(client)
}

/// The version and the cipher suite of a handshake with a client that speaks these versions alone.
fn handshake(
    server: &Signed,
    clients: Arc<RootCertStore>,
    client: &Identity,
    of_server: &Tls12,
    versions: &[&'static SupportedProtocolVersion],
) -> Result<(ProtocolVersion, CipherSuite), Error> {
    let kx = KeyExchange::Classic;
    let credentials = ServerCredentials::fixed(&server.identity(), Some(clients), kx).unwrap();
    let accepting = tls::server(credentials, kx, of_server).unwrap();
    let certified = client.certified(&kx.provider()).unwrap();
    let connecting = ClientConfig::builder_with_provider(kx.provider())
        .with_protocol_versions(versions)
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(of_servers(roots(server), CertificateRules::Go).unwrap())
        .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(certified)));
    let client = shake_hands(connecting, accepting)?;
    let suite = client.negotiated_cipher_suite().unwrap().suite();
    Ok((client.protocol_version().unwrap(), suite))
}

#[test]
fn signatures_by_unusual_certificates_are_verified_in_both_versions() {
    let server = self_signed(authority("own", |_| {}));
    let (clients, client) = version_1();
    for (version, expected) in
        [(&TLS12, ProtocolVersion::TLSv1_2), (&TLS13, ProtocolVersion::TLSv1_3)]
    {
        let found =
            handshake(&server, clients.clone(), &client, &Tls12::AnySuite, &[version]).unwrap();
        assert_eq!(found.0, expected);
    }
    let key = KeyPair::generate().unwrap().serialize_der().try_into().unwrap();
    let mismatch = Identity { key, ..client };
    mismatch.certified(&KeyExchange::Classic.provider()).unwrap_err();
}

#[test]
fn peers_of_our_own_agree_on_aes_128() {
    let server = self_signed(authority("own", |_| {}));
    let (clients, client) = version_1();
    let found = handshake(&server, clients, &client, &Tls12::AnySuite, &[&TLS13]).unwrap();
    assert_eq!(found.1, CipherSuite::TLS13_AES_128_GCM_SHA256);
}

#[test]
fn tls_1_2_is_spoken_where_it_is_allowed_with_the_listed_cipher_suites() {
    const SUITE: CipherSuite = CipherSuite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256;
    let server = self_signed(authority("own", |_| {}));
    let (clients, client) = version_1();
    let handshake = |tls12: &Tls12, versions: &[&'static SupportedProtocolVersion]| {
        handshake(&server, clients.clone(), &client, tls12, versions)
    };
    for off in [Tls12::Off, Tls12::Suites(vec![])] {
        handshake(&off, &[&TLS12]).unwrap_err();
        assert_eq!(handshake(&off, &[&TLS12, &TLS13]).unwrap().0, ProtocolVersion::TLSv1_3);
    }
    let listed = Tls12::Suites(vec![SUITE]);
    assert_eq!(handshake(&listed, &[&TLS12]).unwrap(), (ProtocolVersion::TLSv1_2, SUITE));
    assert_eq!(handshake(&listed, &[&TLS12, &TLS13]).unwrap().0, ProtocolVersion::TLSv1_3);
    let of_rsa = Tls12::Suites(vec![CipherSuite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256]);
    handshake(&of_rsa, &[&TLS12]).unwrap_err();
    assert_eq!(Tls12::supported_suites().len(), 6);
}

/// The group of a handshake between peers with these key exchanges, both with TLS 1.2.
fn agreed_group(client: KeyExchange, server: KeyExchange) -> Option<NamedGroup> {
    let identity = self_signed(authority("own", |_| {}));
    let credentials = ServerCredentials::fixed(&identity.identity(), None, server).unwrap();
    let accepting = tls::server(credentials, server, &Tls12::AnySuite).unwrap();
    let rules = CertificateRules::Go;
    let options = tls::ClientOptions { key_exchange: client, tls12: Tls12::AnySuite, rules };
    let connecting = tls::client(roots(&identity), None, &options).unwrap();
    let client = shake_hands(connecting, accepting).ok()?;
    Some(client.negotiated_key_exchange_group().unwrap().name())
}

#[test]
fn a_peer_that_is_post_quantum_alone_never_agrees_on_a_classical_key_exchange() {
    use KeyExchange::{Classic, Hybrid, PostQuantum};
    for peer in [Hybrid, PostQuantum] {
        assert_eq!(agreed_group(PostQuantum, peer), Some(NamedGroup::X25519MLKEM768));
        assert_eq!(agreed_group(peer, PostQuantum), Some(NamedGroup::X25519MLKEM768));
    }
    assert_eq!(agreed_group(PostQuantum, Classic), None);
    assert_eq!(agreed_group(Classic, PostQuantum), None);
    assert_eq!(agreed_group(Classic, Hybrid), Some(NamedGroup::X25519));
}
