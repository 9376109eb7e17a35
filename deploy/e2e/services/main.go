// Command services is the HTTPS server of a pod on the node: an admission webhook and an aggregated API.
//
//	POST /mutate                                    adds the label mutated=yes
//	POST /validate                                  refuses objects that are called "forbidden"
//	GET  /apis/lab.culvert.dev/v1                   the resources of the API
//	GET  /apis/lab.culvert.dev/v1/payloads/BYTES    a text of so many bytes
package main

import (
	"encoding/json"
	"log"
	"net/http"
	"os"
	"strconv"
	"strings"
)

const (
	group      = "/apis/lab.culvert.dev/v1"
	maxPayload = 16 << 20
	patch      = `[{"op":"add","path":"/metadata/labels","value":{"mutated":"yes"}}]`
)

type object = map[string]any

type review struct {
	APIVersion string `json:"apiVersion"`
	Kind       string `json:"kind"`
	Request    struct {
		UID  string `json:"uid"`
		Name string `json:"name"`
	} `json:"request"`
}

func main() {
	if len(os.Args) != 4 {
		log.Fatal("usage: services ADDRESS CERTIFICATE KEY")
	}
	http.HandleFunc("POST /mutate", admission(func(review) object {
		return object{"allowed": true, "patchType": "JSONPatch", "patch": []byte(patch)}
	}))
	http.HandleFunc("POST /validate", admission(func(asked review) object {
		if asked.Request.Name != "forbidden" {
			return object{"allowed": true}
		}
		return object{"allowed": false, "status": object{"message": "the lab forbids this name"}}
	}))
	http.HandleFunc("GET "+group, func(w http.ResponseWriter, _ *http.Request) {
		answer(w, object{"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": "lab.culvert.dev/v1",
			"resources": []object{{"name": "payloads", "singularName": "payload", "namespaced": false,
				"kind": "Payload", "verbs": []string{"get"}}}})
	})
	http.HandleFunc("GET "+group+"/payloads/{bytes}", payload)
	log.Fatal(http.ListenAndServeTLS(os.Args[1], os.Args[2], os.Args[3], nil))
}

func admission(decide func(review) object) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		var asked review
		if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxPayload)).Decode(&asked); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		response := decide(asked)
		response["uid"] = asked.Request.UID
		answer(w, object{"apiVersion": asked.APIVersion, "kind": asked.Kind, "response": response})
	}
}

func payload(w http.ResponseWriter, r *http.Request) {
	bytes, err := strconv.Atoi(r.PathValue("bytes"))
	if err != nil || bytes < 0 || bytes > maxPayload {
		http.Error(w, "not a size", http.StatusBadRequest)
		return
	}
	answer(w, object{"apiVersion": "lab.culvert.dev/v1", "kind": "Payload",
		"metadata": object{"name": r.PathValue("bytes")}, "text": strings.Repeat("x", bytes)})
}

func answer(w http.ResponseWriter, value object) {
	w.Header().Set("Content-Type", "application/json")
	if err := json.NewEncoder(w).Encode(value); err != nil {
		log.Print(err)
	}
}
